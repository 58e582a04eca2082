"""Lorsas shared with others: on the Hugging Face Hub, or in a folder with the same files."""
