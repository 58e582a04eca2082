"""Events of training, and who is told: curves, trackers."""
