"""Stores looked after: info, verify, repair, merge, remove."""
