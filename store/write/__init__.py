"""Stores written."""
