"""Changes of features in the live model."""
