"""Stores read."""
