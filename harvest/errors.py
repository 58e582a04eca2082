"""The one error of the harvest."""


class HarvestError(Exception):
    """A model, corpus or request that cannot be harvested; the message says what to type."""
