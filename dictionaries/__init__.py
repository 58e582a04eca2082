"""Dictionaries: activations as features of which few fire, their measures and checkpoints."""
