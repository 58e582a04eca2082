"""The error that all others of the package are kinds of."""


class LorsaError(Exception):
    """A known failure; the message is one line that says what was given and what to do."""


class AnalyzeError(LorsaError):
    """A run that cannot be analysed as asked; the message says what to change."""


class ExchangeError(LorsaError):
    """A Lorsa that cannot be exchanged; the message says why and what to do."""


class HarvestError(LorsaError):
    """A model, corpus or request that cannot be harvested; the message says what to type."""


class LanguageModelError(HarvestError):
    """A language model that cannot be found, loaded or understood; the message says what to do."""


class CheckpointError(LorsaError):
    """A checkpoint that cannot be read or written; the message names the path and the next step."""


class AttachError(LorsaError):
    """A language model, or a call of it, in which a Lorsa cannot stand in for a layer."""


class PublishError(LorsaError):
    """A Lorsa that cannot be shared as asked; the message says what to change."""


class UsageError(LorsaError):
    """A request that makes no sense; exit code 2."""


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


class TrainError(LorsaError):
    """A run that cannot begin or go on; the message says what to change."""


RUN_ERRORS = (TrainError, CheckpointError, StoreError, OSError)
"""What ends one of several runs and leaves the others."""
