"""Texts, tokens and sequences."""
