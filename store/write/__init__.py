"""Writing of stores: creation, shards, commits."""
