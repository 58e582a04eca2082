"""The errors of models."""

from ..errors import LorsaError


class CheckpointError(LorsaError):
    """A checkpoint that cannot be read or written; the message names the path and the next step."""
