"""The on-disk activation store: written once by a harvest, read by many runs."""
