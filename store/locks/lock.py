"""Who may change a store now: any number of writers of shards, or one that changes what it is.

A lock is *shared* by the processes that write shards, and *exclusive* for what changes the store
itself: to begin one, to add or remove layers, to repair. Whoever holds the lock can claim parts of
the work by name, a shard for example, which nobody else gets meanwhile.

On a disk both are flock(2) on files in the journal's folder, and end with their process, however
that ends. In a bucket they are objects; see `members`.
"""

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from ...errors import BusyError, StoreError
from ..bucket import BucketPath
from ..manifest import JOURNAL
from ..places import Place
from .bucket_lock import CLAIM, LOCK, BucketLock

LOCK_POLL_S = 0.1
LOCK_WAIT_S = 60.0
"""How long what takes a moment is waited for: another that begins or finishes the same store."""


class Claim(Protocol):
    """A part of the work that is this process's for now."""

    def release(self) -> None:
        """Let others have it."""


class Lock(Protocol):
    """The lock of a store while it is held."""

    def require_held(self) -> None:
        """Raise StoreError if others may have been let in meanwhile."""

    def claim(self, name: str) -> Claim | None:
        """Claim a part of the work; None if another process has it."""

    def holds(self, name: str) -> bool:
        """Tell whether this process has claimed it."""

    def claimed(self) -> set[str]:
        """Return the names of claims, of which some may be those of dead processes."""

    def sweep(self) -> None:
        """Remove what dead processes have left."""

    def release(self) -> None:
        """Let others write."""


class FolderClaim:
    """A claim on a disk: a file that is locked, and gone afterwards."""

    def __init__(self, path: Path, file: IO[bytes], mine: set[str]) -> None:
        self._path = path
        self._file = file
        self._mine = mine
        mine.add(path.name)

    def release(self) -> None:
        """Remove the file while it is locked, so that nobody loses one that is his."""
        self._mine.discard(self._path.name)
        try:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        finally:
            self._file.close()


class FolderLock:
    """The lock of a store on a disk."""

    def __init__(self, store: Path, *, exclusive: bool) -> None:
        """Take it.

        Raises:
            BusyError: another process has it.
            StoreError: the store cannot be written.
        """
        self._journal = store / JOURNAL
        self._mine: set[str] = set()
        try:
            self._journal.mkdir(parents=True, exist_ok=True)
            self._file = _open(self._journal / LOCK)
        except OSError as error:
            raise StoreError(
                f"{store} cannot be written ({error.strerror}), only read; make it writable, or "
                "copy it to another disk"
            ) from None
        if not _flock(self._file, store, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
            raise BusyError(
                f"{store} is being {'written' if exclusive else 'changed'} by another process; "
                "wait for it or choose another --store"
            )

    def require_held(self) -> None:
        """Do nothing: while the process lives, nobody else gets the lock."""

    def claim(self, name: str) -> FolderClaim | None:
        """Claim a part of the work; None if another process has it."""
        path = self._journal / (name + CLAIM)
        while True:
            try:
                file = _open(path)
            except OSError as error:
                raise StoreError(
                    f"{path} cannot be written ({error.strerror}); what was committed is safe: "
                    "make room and run the same command again"
                ) from None
            if not _flock(file, path, fcntl.LOCK_EX):
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return FolderClaim(path, file, self._mine)
            file.close()  # whoever had it removed it between the two steps

    def holds(self, name: str) -> bool:
        """Tell whether this process has claimed it."""
        return name + CLAIM in self._mine

    def claimed(self) -> set[str]:
        """Return the names of claims, of which some may be those of dead processes."""
        return {path.name.removesuffix(CLAIM) for path in self._journal.glob("*" + CLAIM)}

    def sweep(self) -> None:
        """Remove what dead processes have left."""
        for name in self.claimed():
            if (claim := self.claim(name)) is not None:
                claim.release()

    def release(self) -> None:
        """Let others write."""
        self._file.close()


def _open(path: Path) -> IO[bytes]:
    # over NFS, a shared lock takes a file that can be read, an exclusive one that can be written
    return path.open("a+b")


def _flock(file: IO[bytes], path: Path, kind: int) -> bool:
    """Lock a file; if another has it locked, or it cannot be locked, it is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    except OSError as error:
        file.close()
        raise StoreError(f"{path} cannot be locked ({error.strerror})") from None
    return True


def take_lock(
    store: Place,
    *,
    exclusive: bool = True,
    wait_s: float = 0.0,
    unless: Callable[[], None] = lambda: None,
) -> Lock:
    """Take the lock of a store.

    Args:
        store: its place.
        exclusive: for what changes the store itself; otherwise shared with other writers.
        wait_s: how long to wait for others.
        unless: asked before each try; raises if there is nothing to wait for.

    Raises:
        BusyError: others still have it.
        StoreError: the store cannot be written.
    """
    ends = time.monotonic() + wait_s
    while True:
        unless()
        try:
            if isinstance(store, BucketPath):
                return BucketLock(store, exclusive=exclusive)
            return FolderLock(store, exclusive=exclusive)
        except BusyError:
            if time.monotonic() >= ends:
                raise
        time.sleep(LOCK_POLL_S)
