"""Stage 2: dictionaries from a store."""
