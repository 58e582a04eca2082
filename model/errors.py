"""The errors of models."""

from ..errors import LorsaError


class CheckpointError(LorsaError):
    """A checkpoint that cannot be read or written; the message names the path and the next step."""


class AttachError(LorsaError):
    """A language model, or a call of it, in which a Lorsa cannot stand in for a layer."""
