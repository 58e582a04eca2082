"""Choices of a dictionary's settings, and the names of its files; imports nothing heavy."""

ACTIVATIONS = ("topk", "batchtopk", "jumprelu")
CONFIG = "config.json"
"""File of a dictionary's shape and origin, beside its weights."""
WEIGHTS = "lorsa.safetensors"
