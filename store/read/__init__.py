"""Reading of stores: sequences, batches and their order."""
