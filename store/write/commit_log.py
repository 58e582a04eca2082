"""Journal, table and manifest of a store, as one of its writers changes them.

A line in the journal commits files. The manifest goes when a finished store loses a file and comes
back, after the table, when nothing is missing.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager

from ...errors import AGAIN, StoreError, remedy_of
from ...sites import Site
from ..arrays import site_arrays
from ..entries import Entry
from ..folder import is_complete
from ..journal import JournalWriter
from ..locks.lock import LOCK_WAIT_S, Lock
from ..manifest import MANIFEST, Manifest, read_manifest
from ..places import Place, sync, write_atomically
from ..table import write_table
from .claims import claimed
from .status import ShardStatus

FINISH = "finish"
"""Name of the claim under which a store becomes finished, or unfinished again."""


class CommitLog:
    """The commits of one process; it may be used by several threads."""

    def __init__(self, root: Place, manifest: Manifest, lock: Lock, status: ShardStatus) -> None:
        """Begin with a journal file of its own, which is created with the first line."""
        self._root = root
        self._manifest = manifest
        self._lock = lock
        self._status = status
        self._journal = JournalWriter(root)
        self._journal_lock = threading.Lock()

    def commit(self, entries: list[Entry]) -> None:
        """Record the files of a shard, all of them in one line of the journal."""
        with self._journal_lock:
            self._lock.require_held()
            self._journal.commit(entries)

    def begin_shard(self, shard: int, sites: Sequence[Site]) -> list[Site]:
        """Return which of some sites a claimed shard lacks; drop what is committed of them.

        A kill may leave new files with old checksums. A finished store that had such a site is
        unfinished from here on: its table has the old checksums too.
        """
        self._status.read()
        missing = self._status.missing_sites(shard, sites)
        keys = {(shard, spec.name) for spec in site_arrays(self._manifest, missing)}
        if (last := self._status.last_mention(keys)) is not None:
            with self._journal_lock:
                self._journal.come_after(last)
        if stale := keys & self._status.entries.keys():
            with self._finishing():
                self._lock.require_held()
                if is_complete(self._root) and (
                    set(missing) & set(read_manifest(self._root / MANIFEST).sites)
                ):
                    (self._root / MANIFEST).unlink()
                    sync(self._root)
                with self._journal_lock:
                    self._journal.drop(stale)
        return missing

    def finish(self) -> None:
        """Write shards.parquet and, last of all, manifest.json, unless another process has.

        Raises:
            StoreError: shards are missing.
        """
        with self._finishing():
            self._status.refresh()
            if missing := self._status.missing_shards(self._manifest.sites):
                raise StoreError(f"{self._root} lacks {len(missing)} shards; run the harvest again")
            try:
                self._lock.require_held()
                if not self._status.is_finished():
                    write_table(self._root, self._status.rows(), self._manifest.uuid)
                    write_atomically(self._root / MANIFEST, self._manifest.to_json())
                self._lock.sweep()
            except OSError as error:
                raise StoreError(
                    f"{self._root} cannot be finished ({error.strerror}); all shards are safe: "
                    f"{remedy_of(error) or AGAIN}"
                ) from None

    def _finishing(self) -> AbstractContextManager[None]:
        busy = f"{self._root} is being finished by another process; run the same command again"
        return claimed(self._lock, FINISH, LOCK_WAIT_S, busy=busy)
