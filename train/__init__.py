"""Stage 2: Lorsas from a store."""
