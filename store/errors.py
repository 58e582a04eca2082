"""The one error of the store."""


class StoreError(Exception):
    """A store that cannot be read or written; the message names the path and the next step."""


class FormatVersionError(StoreError):
    """A store of another format version: whole, but not for this version of lorsa."""
