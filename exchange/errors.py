"""The error of this folder."""


class ExchangeError(Exception):
    """A Lorsa that cannot be exchanged; the message says why and what to do."""
