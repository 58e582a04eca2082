"""The error of this folder."""

from ..errors import LorsaError


class ExchangeError(LorsaError):
    """A Lorsa that cannot be exchanged; the message says why and what to do."""
