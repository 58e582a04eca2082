"""Lorsas shared with others: on the Hugging Face Hub, or in a folder laid out like there."""
