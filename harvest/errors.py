"""The one error of the harvest."""

from ..errors import LorsaError


class HarvestError(LorsaError):
    """A model, corpus or request that cannot be harvested; the message says what to type."""
