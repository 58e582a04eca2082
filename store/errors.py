"""The one error of the store."""


class StoreError(Exception):
    """A store that cannot be read or written; the message names the path and the next step."""
