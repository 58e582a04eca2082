"""The lock of a store in a bucket, shared or exclusive, and claims under it; see `lock`.

    journal/lock             lease of the process that changes the store itself
    journal/writers/<id>     lease of a process that writes shards
    journal/<name>.claim     claim of a part of the work; it names one of these leases

Each side creates its own lease and then reads the other's, so of two at least one sees the other
and withdraws. A claim is created only if there is none, or over one whose lease is released or has
expired. It is valid as long as its lease, so a writer renews one object, however much it claims.
"""

import json
import re
import uuid
from contextlib import suppress

from ...errors import StoreError
from ..bucket import BucketPath
from ..manifest import JOURNAL
from .lease import Lease, expire, lives, read_facts, refusal, who

LOCK = "lock"
CLAIM = ".claim"
WRITERS = "writers"
_LEASE = re.compile(rf"{LOCK}|{WRITERS}/[0-9a-f-]+")


class BucketClaim:
    """Claim in a bucket: an object that names a lease."""

    def __init__(self, path: BucketPath, lease: Lease, mine: set[str]) -> None:
        self._path = path
        self._lease = lease
        self._mine = mine
        mine.add(path.name)

    def release(self) -> None:
        """Remove the claim unless another process has taken it over."""
        self._mine.discard(self._path.name)
        if self._lease.is_held():
            with suppress(StoreError):  # out of reach: it ends with the lease
                self._path.unlink()


class BucketLock:
    """Lock of a store in a bucket."""

    def __init__(self, store: BucketPath, *, exclusive: bool) -> None:
        """Take the lock.

        Raises:
            BusyError: another process has it.
            StoreError: the bucket cannot be written.
        """
        self._store = store
        self._journal = store / JOURNAL
        self._mine: set[str] = set()
        self._name = LOCK if exclusive else f"{WRITERS}/{uuid.uuid4()}"
        self._lease = Lease(store, self._journal / self._name)
        try:
            self._require_alone() if exclusive else self._require_unchanged()
        except BaseException:
            self.release()
            raise

    def _require_alone(self) -> None:
        """Raise BusyError if shards are being written."""
        for path in (self._journal / WRITERS).iterdir():
            with suppress(FileNotFoundError):
                found = path.read_version()
                if lives(found) or not expire(path, found):
                    raise refusal(self._store, who(found))

    def _require_unchanged(self) -> None:
        """Raise BusyError if the store itself is being changed."""
        with suppress(FileNotFoundError):
            path = self._journal / LOCK
            found = path.read_version()
            is_free = not read_facts(found.content).get("held")
            if not is_free and (lives(found) or not expire(path, found)):
                raise refusal(self._store, who(found))

    def require_held(self) -> None:
        """Raise StoreError if another process may have got the lock meanwhile."""
        self._lease.require_held()

    def claim(self, name: str) -> BucketClaim | None:
        """Claim a part of the work; None if another process has it."""
        self.require_held()
        path = self._journal / (name + CLAIM)
        if path.name in self._mine:
            return None
        content = json.dumps({"lease": self._name, "owner": self._lease.owner}).encode()
        try:
            path.write_version(content, None)
        except FileExistsError:
            try:
                found = path.read_version()
            except FileNotFoundError:
                return None
            if read_facts(found.content).get("owner") != self._lease.owner:  # else sent again
                if self._is_valid(found.content):
                    return None
                try:
                    path.write_version(content, found.etag)
                except FileExistsError:
                    return None
        return BucketClaim(path, self._lease, self._mine)

    def _is_valid(self, claim: bytes) -> bool:
        """Return whether the lease of a claim is valid; one of a dead process is made to expire."""
        facts = read_facts(claim)
        name = facts.get("lease")
        if not isinstance(name, str) or not _LEASE.fullmatch(name):
            return False
        path = self._journal / name
        try:
            found = path.read_version()
        except FileNotFoundError:
            return False
        if read_facts(found.content).get("owner") != facts.get("owner"):
            return False
        return lives(found) or not expire(path, found)

    def claimed(self) -> set[str]:
        """Return the names of all claims; some may be those of dead processes."""
        return {path.name.removesuffix(CLAIM) for path in self._journal.glob("*" + CLAIM)}

    def sweep(self) -> None:
        """Remove all other claims, since nothing is missing, and the leases of dead processes."""
        for path in self._journal.glob("*" + CLAIM):
            if path.name not in self._mine:
                path.unlink()
        for path in (self._journal / WRITERS).iterdir():
            with suppress(FileNotFoundError):
                if not lives(path.read_version()):
                    path.unlink()

    def release(self) -> None:
        """Release the lock."""
        self._lease.release()
        if self._name != LOCK:  # no other process ever takes this one
            with suppress(StoreError):
                self._lease.path.unlink()
