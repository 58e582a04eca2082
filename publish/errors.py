"""The one error of publishing."""

from ..errors import LorsaError


class PublishError(LorsaError):
    """A Lorsa that cannot be shared as asked; the message says what to change."""
