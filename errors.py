"""Errors of the package: known failures, each of one line.

LorsaError
    UsageError                      exit code 2; all others 1
    HarvestError
        LanguageModelError
    TrainError, AnalyzeError, PublishError
    CheckpointError, AttachError, ExchangeError
    StoreError
        DamageError, FormatVersionError, UnreachableError
        BusyError, BegunError
"""

import errno

AGAIN = "run the same command again"
REMEDIES = {
    errno.ENOMEM: f"free some memory, or allow more (ulimit -v), and {AGAIN}",
    errno.EMFILE: f"allow more open files (ulimit -n 4096) and {AGAIN}",
    errno.ENFILE: f"end programs that have many files open, and {AGAIN}",
    errno.EACCES: f"give this user the right to it, and {AGAIN}",
    errno.EPERM: f"give this user the right to it, and {AGAIN}",
    errno.EROFS: "choose a place on a disk that can be written",
    errno.ENOSPC: f"make room and {AGAIN}",
    errno.EDQUOT: f"make room and {AGAIN}",
    errno.ESTALE: f"mount its disk again, and {AGAIN}",
    errno.ETIMEDOUT: f"see to its disk, and {AGAIN}",
}
"""What to do where this machine failed, by error number: of the file itself nothing is known."""


def remedy_of(error: BaseException) -> str | None:
    """Return what to do where this machine failed; None if the file itself may be wrong."""
    if isinstance(error, MemoryError) or "can't start new thread" in str(error):
        return REMEDIES[errno.ENOMEM]
    return REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None


def reason_of(error: BaseException) -> str:
    """Return why something failed, in a few words of one line."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def unreadable(what: object, error: BaseException) -> str:
    """Return that a file, or what is given, cannot be read, why, and what to do if known."""
    path = getattr(error, "filename", None) or what
    remedy = remedy_of(error)
    return f"{path} cannot be read ({reason_of(error)})" + ("" if remedy is None else f"; {remedy}")


class LorsaError(Exception):
    """Known failure; the message is one line that says what was given and what to do."""


class AnalyzeError(LorsaError):
    """Run that cannot be analysed as asked; the message says what to change."""


class ExchangeError(LorsaError):
    """Lorsa that cannot be exchanged; the message says why and what to do."""


class HarvestError(LorsaError):
    """Model, corpus or request that cannot be harvested; the message says what to type."""


class LanguageModelError(HarvestError):
    """A language model that cannot be found, loaded or understood; the message says what to do."""


class CheckpointError(LorsaError):
    """Checkpoint that cannot be read or written; the message names the path and the next step."""


class AttachError(LorsaError):
    """Language model, or a call of it, in which a Lorsa cannot stand in for a layer."""


class PublishError(LorsaError):
    """Lorsa that cannot be shared as asked; the message says what to change."""


class UsageError(LorsaError):
    """Request that makes no sense; exit code 2."""


class StoreError(LorsaError):
    """Store that cannot be read or written; the message names the path and the next step."""


class DamageError(StoreError):
    """File that is not what was written; the caller that knows its store says what to type."""


class UnreachableError(StoreError):
    """Bucket, network, disk or machine that failed: nothing is known of the store itself."""


class FormatVersionError(StoreError):
    """Store of another format version: whole, but not for this version of lorsa."""


class BusyError(StoreError):
    """Lock that another process holds; it may be free in a moment."""


class BegunError(StoreError):
    """Store or layers that another process has created meanwhile; they can be resumed."""


class TrainError(LorsaError):
    """Run that cannot begin or go on; the message says what to change."""


RUN_ERRORS = (TrainError, CheckpointError, StoreError, OSError)
"""Errors that end one of several runs and leave the others."""
