"""Tracing: which features of a prompt make which, by exact edges of the frozen model."""
