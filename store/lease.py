"""One writer at a time for a store in a bucket: an object that its holder renews.

The object is made only if there is none, and changed only if it is still the version that was last
seen, so of two writers one loses, whatever the moment. It says who holds it. A holder is taken for
dead when it has not renewed it for two minutes, or, on this machine, when its process has ended;
then the next writer takes it over. One that was taken for dead and is not finds out at its next
commit.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from .bucket import BucketPath
from .errors import StoreError

RENEW_S = 20.0
DEAD_S = 120.0
"""Without a renewal; more than clocks differ and than a server is out of reach as a rule."""


class Lease:
    """The lock of a store in a bucket."""

    def __init__(self, store: BucketPath, path: BucketPath) -> None:
        """Take it.

        Args:
            store: the store, for messages.
            path: the object.

        Raises:
            StoreError: another process has it, or the bucket cannot be written.
        """
        self._store = store
        self._path = path
        self._facts = {
            "owner": str(uuid.uuid4()),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
        }
        self._renewed = time.time()
        version = self._put(None) or self._take_over()
        self._version = version
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lorsa-lease", daemon=True)
        self._thread.start()

    def require_held(self) -> None:
        """Raise StoreError if another writer may have taken the store meanwhile."""
        if self._lost or time.time() - self._renewed > DEAD_S - RENEW_S:
            raise StoreError(
                f"{self._store} could not be kept locked, and another process may write it now; "
                "what was committed is safe: run the same command again"
            )

    def release(self) -> None:
        """Let others write."""
        self._ended.set()
        self._thread.join(RENEW_S)  # a server out of reach holds nobody up
        if not self._lost:
            with suppress(StoreError):  # out of reach: it ends by itself
                self._put(self._version, held=False)

    def _renew(self) -> None:
        """Renew it now and then, in the thread."""
        while not self._ended.wait(RENEW_S):
            started = time.time()
            with suppress(StoreError):  # out of reach: how long decides
                version = self._put(self._version)
                if version is None:
                    self._lost = True
                    return
                self._version, self._renewed = version, started

    def _put(self, over: str | None, *, held: bool = True) -> str | None:
        """Write the object over a version, None for none; return its own, None if that is gone."""
        # the time makes every version another one
        facts = self._facts | {"held": held, "time": time.time_ns()}
        content = json.dumps(facts).encode()
        try:
            return self._path.write_version(content, over)
        except FileExistsError:  # perhaps by this very request, sent again
            with suppress(FileNotFoundError):
                found = self._path.read_version()
                if _facts(found.content).get("owner") == self._facts["owner"]:
                    return found.etag
            return None

    def _take_over(self) -> str:
        """Take the object from a holder that is done or dead."""
        try:
            found = self._path.read_version()
        except FileNotFoundError:
            raise self._refusal("another process") from None
        facts, age_s = _facts(found.content), time.time() - found.modified
        who = f"process {facts.get('pid')} on {facts.get('host')}, last heard of {age_s:.0f} s ago"
        is_free = not found.content or facts.get("held") is False  # empty: copied from a disk
        if not is_free and age_s < DEAD_S and not self._has_ended(facts):
            raise self._refusal(who)
        version = self._put(found.etag)
        if version is None:
            raise self._refusal("another process")
        return version

    def _has_ended(self, holder: dict[str, Any]) -> bool:
        """Tell whether a holder was a process of this machine that is there no more."""
        pid, machine = holder.get("pid"), self._facts["machine"]
        if machine is None or holder.get("machine") != machine or type(pid) is not int or pid < 1:
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False

    def _refusal(self, who: str) -> StoreError:
        return StoreError(
            f"{self._store} is being written by {who}; wait for it or choose another --store (one "
            f"that was killed is taken for dead after {DEAD_S:.0f} s)"
        )


def _facts(content: bytes) -> dict[str, Any]:
    """Return what the object says, nothing if it makes no sense."""
    with suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    return {}


def _machine() -> str | None:
    """Return what only processes that see each other share; None if that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
