"""Interventions on features in the live language model."""
