"""The error of checkpoints."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message names the path and the next step."""
