"""Lorsas from and for other tools."""
