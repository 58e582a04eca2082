"""The error of the store, and its kinds."""

from ..errors import LorsaError


class StoreError(LorsaError):
    """A store that cannot be read or written; the message names the path and the next step."""


class DamageError(StoreError):
    """A file that is not what was written; who knows its store says what to type."""


class UnreachableError(StoreError):
    """A bucket, or the way to it, failed: nothing is known of the store itself."""


class FormatVersionError(StoreError):
    """A store of another format version: whole, but not for this version of lorsa."""


class BusyError(StoreError):
    """Another process holds what is asked for; it may be free in a moment."""


class BegunError(StoreError):
    """Another process has begun this very thing meanwhile: go on with it."""
