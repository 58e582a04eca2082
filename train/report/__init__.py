"""Reports of training: events, curves, trackers."""
