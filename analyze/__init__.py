"""Analyses: when features of a dictionary fire, what they read and what they write."""
