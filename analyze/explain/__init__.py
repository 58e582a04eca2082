"""Descriptions of features by a language model."""
