"""What a trained Lorsa does, and how well it stands in for its layer."""
