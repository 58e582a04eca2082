"""Attention of Lorsa heads: types, probes, parents."""
