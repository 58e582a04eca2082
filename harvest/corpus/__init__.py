"""Corpora: documents in, sequences of token ids out."""
