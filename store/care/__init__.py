"""Care of stores: info, verify, repair, merge, remove."""
