"""The commands: each parses its options, builds one config, calls one function, and prints."""
