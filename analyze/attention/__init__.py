"""Attention of Lorsa heads: sources, types, probes, parents, successors."""
