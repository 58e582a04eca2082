"""Leases in a bucket: objects that name their holder, who renews them.

A lease is created only if there is none, and changed only if it is still the version that was last
read, so of two writers one always loses. It expires when it was not renewed for two minutes, or, on
this machine, when its holder's process has ended; then the next writer takes it over. A holder that
was slow notices at its next commit. `bucket_lock` builds the lock of a store from leases.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from ...errors import BusyError, StoreError
from ...reading import parse_json
from ..bucket import BucketPath, Version

RENEW_S = 20.0
_TRIED: set[str] = set()
"""Buckets whose conditional writes this process has tried."""
DEAD_S = 120.0
"""Seconds without renewal after which a lease expires. Clocks differ by less, and a server is
rarely out of reach for longer."""


class Lease:
    """Lease of this process on a store, renewed by a thread until it is released."""

    def __init__(self, store: BucketPath, path: BucketPath) -> None:
        """Take the lease.

        Args:
            store: the store, for messages.
            path: the object of the lease.

        Raises:
            BusyError: another process holds it.
            StoreError: the bucket cannot be written.
        """
        self._store = store
        self.path = path
        self.owner = str(uuid.uuid4())
        """Random identifier of this lease"""
        self._facts = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
        }
        self._renewed = time.time()
        version = self._put(None) or self._take_over()
        self._version = self._try_conditions(version)
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lorsa-lease", daemon=True)
        self._thread.start()

    def require_held(self) -> None:
        """Raise StoreError if another writer may have taken the store meanwhile."""
        if not self.is_held():
            raise StoreError(
                f"{self._store} could not be kept locked, and another process may write it now; "
                "what was committed is safe: run the same command again"
            )

    def is_held(self) -> bool:
        """Return whether it is certain that no other process holds the lease."""
        return not self._lost and time.time() - self._renewed <= DEAD_S - RENEW_S

    def release(self) -> None:
        """Release the lease."""
        self._ended.set()
        self._thread.join(RENEW_S)  # a server out of reach holds nobody up
        if not self._lost:
            with suppress(StoreError):  # out of reach: it ends by itself
                self._put(self._version, held=False)

    def _renew(self) -> None:
        """Renew the lease every RENEW_S until it is released; in a thread."""
        while not self._ended.wait(RENEW_S):
            started = time.time()
            with suppress(StoreError):  # out of reach: how long decides
                version = self._put(self._version)
                if version is None:
                    self._lost = True
                    return
                self._version, self._renewed = version, started

    def _put(self, over: str | None, *, held: bool = True) -> str | None:
        """Replace a version, None: none; return the new version, None if there is another one."""
        # the time makes every version another one
        facts = self._facts | {"held": held, "time": time.time_ns()}
        content = json.dumps(facts).encode()
        try:
            return self.path.write_version(content, over)
        except FileExistsError:  # perhaps by this very request, sent again
            with suppress(FileNotFoundError):
                found = self.path.read_version()
                if read_facts(found.content).get("owner") == self.owner:
                    return found.etag
            return None

    def _try_conditions(self, version: str) -> str:
        """Put the lease on conditions that do not hold, which a server must refuse, once a bucket.

        Returns:
            The lease's version.

        Raises:
            StoreError: the server has not refused: two processes would write the same store.
        """
        bucket = self.path.bucket
        if bucket in _TRIED:
            return version
        newer = self._put(version)
        if newer is None:
            raise self._refusal("another process")
        for header, over in (("If-None-Match", None), ("If-Match", version)):
            with suppress(FileExistsError):
                self.path.write_version(self.path.read_bytes(), over)
                self.path.unlink()  # whoever asks next is not kept waiting for it
                raise StoreError(
                    f"s3://{bucket} ignores conditional writes ({header}), by which processes "
                    "agree who writes a store: use a server that has them, or harvest to a disk "
                    "and copy the store there"
                )
        _TRIED.add(bucket)
        return newer

    def _take_over(self) -> str:
        """Take over a lease that was released or has expired."""
        try:
            found = self.path.read_version()
        except FileNotFoundError:
            raise self._refusal("another process") from None
        if lives(found):
            raise self._refusal(who(found))
        version = self._put(found.etag)
        if version is None:
            raise self._refusal("another process")
        return version

    def _refusal(self, who: str) -> BusyError:
        return refusal(self._store, who)


def refusal(store: BucketPath, who: str) -> BusyError:
    """Return the error that names the holder."""
    return BusyError(
        f"{store} is being written by {who}; wait for it or choose another --store (one that was "
        f"killed is taken for dead after {DEAD_S:.0f} s)"
    )


def lives(found: Version) -> bool:
    """Return whether a lease is held and has not expired."""
    facts = read_facts(found.content)
    if not found.content or facts.get("held") is False:  # empty: copied from a disk
        return False
    return time.time() - found.modified < DEAD_S and not _has_ended(facts)


def who(found: Version) -> str:
    """Name the holder of a lease."""
    facts, age_s = read_facts(found.content), time.time() - found.modified
    return f"process {facts.get('pid')} on {facts.get('host')}, last heard of {age_s:.0f} s ago"


def expire(path: BucketPath, found: Version) -> bool:
    """Make the lease of a dead holder expire for good; False if it was renewed meanwhile."""
    with suppress(FileExistsError):
        path.write_version(json.dumps({"held": False, "time": time.time_ns()}).encode(), found.etag)
        return True
    return False


def read_facts(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a lease or claim; empty if it is damaged."""
    with suppress(ValueError):
        found = parse_json(content)
        if isinstance(found, dict):
            return found
    return {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Return whether a holder was a process of this machine that has ended."""
    pid, machine = holder.get("pid"), _machine()
    if machine is None or holder.get("machine") != machine or type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _machine() -> str | None:
    """Return an identifier that processes share if they see each other's pids; None if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
