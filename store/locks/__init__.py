"""Locks on a store, in a folder and in a bucket."""
