"""The lock of a store: shared by writers of shards, exclusive for what changes the store.

Creating a store, adding or removing layers, and repair need the *exclusive* lock. A holder of
either lock can claim parts of the work by name, a shard for example, which no other process gets
meanwhile.

On a disk, locks and claims are flock(2) on files in the journal's folder, which ends with its
process. In a bucket they are objects; see `bucket_lock`.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from ...errors import AGAIN, BusyError, StoreError, remedy_of
from ..bucket import BucketPath
from ..manifest import JOURNAL
from ..open_files import or_let_go
from ..places import Place
from ..waiting import waiting_for
from .bucket_lock import CLAIM, LOCK, BucketLock

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
LOCK_POLL_S = 0.1
"""Seconds between two tries"""
LOCK_WAIT_S = 60.0
"""Seconds to wait for a process that creates, changes or finishes the same store"""


class Claim(Protocol):
    """Part of the work that only this process may do."""

    def release(self) -> None:
        """Let other processes claim it."""


class Lock(Protocol):
    """Lock of a store while it is held."""

    def require_held(self) -> None:
        """Raise StoreError if another process may have got the lock meanwhile."""

    def claim(self, name: str) -> Claim | None:
        """Claim a part of the work; None if another process has it."""

    def claimed(self) -> set[str]:
        """Return the names of all claims; some may be those of dead processes."""

    def sweep(self) -> None:
        """Remove the claims of dead processes."""

    def release(self) -> None:
        """Release the lock."""


class FolderClaim:
    """Claim on a disk: a locked file, which is removed when it is released."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file

    def release(self) -> None:
        """Remove the file while it is locked, so that no other process loses its own."""
        try:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        finally:
            self._file.close()


class FolderLock:
    """Lock of a store on a disk."""

    def __init__(self, store: Path, *, exclusive: bool) -> None:
        """Take the lock.

        Raises:
            BusyError: another process has it.
            StoreError: the store cannot be written.
        """
        self._journal = store / JOURNAL
        try:
            self._journal.mkdir(parents=True, exist_ok=True)
            self._file = _open(self._journal / LOCK)
        except OSError as error:
            remedy = f"; {remedy_of(error) or AGAIN}"
            if error.errno in _READ_ONLY:
                remedy = ", only read; make it writable, or copy it to another disk"
            raise StoreError(f"{store} cannot be written ({error.strerror}){remedy}") from None
        if not _flock(self._file, store, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
            raise BusyError(
                f"{store} is being {'written' if exclusive else 'changed'} by another process; "
                "wait for it or choose another --store"
            )

    def require_held(self) -> None:
        """Do nothing: no other process gets the lock while this one lives."""

    def claim(self, name: str) -> FolderClaim | None:
        """Claim a part of the work; None if another process has it."""
        path = self._journal / (name + CLAIM)
        while True:
            try:
                file = _open(path)
            except OSError as error:
                raise StoreError(
                    f"{path} cannot be written ({error.strerror}); what was committed is safe: "
                    f"{remedy_of(error) or AGAIN}"
                ) from None
            if not _flock(file, path, fcntl.LOCK_EX):
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return FolderClaim(path, file)
            file.close()  # whoever had it removed it between the two steps

    def claimed(self) -> set[str]:
        """Return the names of all claims; some may be those of dead processes."""
        return {path.name.removesuffix(CLAIM) for path in self._journal.glob("*" + CLAIM)}

    def sweep(self) -> None:
        """Remove the claims of dead processes."""
        for name in self.claimed():
            if (claim := self.claim(name)) is not None:
                claim.release()

    def release(self) -> None:
        """Release the lock."""
        self._file.close()


def _open(path: Path) -> IO[bytes]:
    # over NFS, a shared lock takes a file that can be read, an exclusive one that can be written
    return or_let_go(lambda: path.open("a+b"))


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


def require_conditions(store: Place) -> None:
    """Raise StoreError if a store cannot be locked where it is to be; known before long work."""
    if isinstance(store, BucketPath):
        with suppress(BusyError):  # whose holder has tried
            take_lock(store).release()


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
        exclusive: whether no other process may hold it; otherwise writers of shards share it.
        wait_s: how long to wait for others.
        unless: called before each try; raises if there is nothing to wait for.

    Raises:
        BusyError: others still have it.
        StoreError: the store cannot be written.
    """
    ends = time.monotonic() + wait_s
    with waiting_for(f"another process that writes or changes {store}"):
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
