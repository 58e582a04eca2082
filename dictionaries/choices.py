"""Choices of a dictionary's settings, and the name of their file; imports nothing heavy."""

ACTIVATIONS = ("topk", "batchtopk", "jumprelu")
CONFIG = "config.json"
"""File of a dictionary's shape and origin, beside its weights."""
