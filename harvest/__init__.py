"""Stage 1: a language model's attention inputs and outputs, written to a store."""
