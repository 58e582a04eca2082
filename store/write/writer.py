"""Writing of a store by any number of processes, each shard whole or not at all.

    with StoreWriter.create(path, manifest, tokens=..., ...) as writer:
        for shard in writer.claimed_shards():
            with writer.shard(shard) as session:
                session.append({site: values, ...})       # a few sequences at a time, in order
        writer.finish()                                   # shards.parquet, then manifest.json

A shard is committed when its block ends without an exception: its files are flushed and renamed,
then one line in the journal lists them. A shard that was not committed leaves nothing that a reader
would take for data. `StoreWriter.resume` goes on at the first missing shard, also beside other
writers: a shard is claimed by one process at a time, and free again when that process ends.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

from torch import Tensor

from ...errors import BusyError, StoreError
from ...sites import Site
from ..arrays import is_int8, text_arrays
from ..entries import Entry
from ..fixed import read_channel
from ..folder import is_begun, is_complete, repair_command, require_covered, why_not_a_store
from ..locks.lock import LOCK_WAIT_S, Claim, Lock, take_lock
from ..manifest import PLAN, Manifest, read_manifest
from ..places import Place
from ..read.rows import RowReader
from ..site_facts import SiteFacts
from ..unlisted import require_listed
from .claims import claim_shards
from .commit_log import CommitLog
from .create import Sample, Weights, create_sites, create_store
from .session import ShardSession
from .status import ShardStatus
from .write_queue import WriteQueue

BUFFER_BYTES = 4 << 30
"""Most bytes of activations that may wait for the disk before the model has to."""


class StoreWriter:
    """Writes the shards of a store; use it in a `with` block, which releases the store's lock."""

    def __init__(
        self,
        root: Place,
        manifest: Manifest,
        lock: Lock,
        *,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Use `create`, `resume` or `add_sites`."""
        self.root = root
        self.manifest = manifest
        self._lock = lock
        tokens, _ = text_arrays(manifest)
        self._tokens = RowReader(root, tokens, n_seq=manifest.n_seq, shard_seqs=manifest.shard_seqs)
        self._queue = WriteQueue(buffer_bytes)
        self._channels: dict[str, Tensor] = {}
        self._claims: dict[int, Claim] = {}
        self._lent: int | None = None
        """Shard that `claimed_shards` has yielded and not yet taken back"""
        self._open: ShardSession | None = None
        self._unsettled: list[ShardSession] = []
        self.status = ShardStatus(root, manifest)
        """Committed and missing shards, as this writer last read them"""
        self.status.require_readable()
        self._log = CommitLog(root, manifest, lock, self.status)
        self.sites_to_write = [s for s in manifest.sites if self.status.missing_shards([s])]
        """Sites that some shard lacked when this process joined: the sites of a batch"""

    @classmethod
    def create(
        cls,
        root: Place,
        manifest: Manifest,
        *,
        tokens: Tensor,
        documents: Tensor,
        document_names: list[str],
        modules: Weights,
        sample: Sample | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> Self:
        """Create a store with its metadata, token ids and weights, and join its writers.

        Args:
            root: a folder that is empty or does not exist, or a place in a bucket; a store whose
                creation was interrupted is replaced.
            manifest: facts of the store.
            tokens, documents: int32, [n_seq, n_ctx].
            document_names: names of the documents that `documents` numbers.
            modules: parameters of every module, such as 12.attention, by name.
            sample: some activations of every site that is stored, [..., width]; int8 takes the
                scales of its channels from them, other dtypes need none.
            buffer_bytes: most bytes of activations that may wait for the disk.

        Raises:
            BegunError: another process has created a store here meanwhile: `resume` joins it.
            StoreError: the folder holds something else, or the disk is full.
            ValueError: tokens, documents or weights are not those of the manifest.
        """
        create_store(
            root,
            manifest,
            tokens=tokens,
            documents=documents,
            document_names=document_names,
            weights=modules,
            sample=sample or {},
        )
        return cls.resume(root, buffer_bytes=buffer_bytes)

    @classmethod
    def add_sites(
        cls,
        root: Place,
        sites: Mapping[Site, SiteFacts],
        facts: Mapping[str, dict[str, Any]],
        *,
        modules: Weights,
        sample: Sample | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> Self:
        """Create new sites of a finished store, which stays readable, and join its writers.

        Args:
            root: place of the store.
            sites: facts of the new sites.
            facts: facts of their modules, as a manifest has them; those of modules that the store
                has are left alone.
            modules, sample, buffer_bytes: as for `create`, of these sites.

        Raises:
            BegunError: another process is adding them already, and `resume` joins it; or the store
                has some of them.
            StoreError: the store is unfinished, other sites are being added, or it is written.
            ValueError: modules or sample are not those of the sites.
        """
        create_sites(root, sites, facts, weights=modules, sample=sample or {})
        return cls.resume(root, buffer_bytes=buffer_bytes)

    @classmethod
    def resume(cls, root: Place, *, buffer_bytes: int = BUFFER_BYTES) -> Self:
        """Join the writers of a store that was begun.

        Args:
            root: place of the store.
            buffer_bytes: most bytes of activations that may wait for the disk.

        Raises:
            BusyError: the store is being created, repaired or shrunk for more than a minute.
            StoreError: there is no store, or journal or token ids are damaged.
        """
        if not is_begun(root):
            gone = f"{root} has no {PLAN} any more; write it anew with: {repair_command(root)}"
            raise StoreError(gone if is_complete(root) else why_not_a_store(root))
        lock = take_lock(root, exclusive=False, wait_s=LOCK_WAIT_S)
        try:
            writer = cls(root, read_manifest(root / PLAN), lock, buffer_bytes=buffer_bytes)
            require_listed(root, writer.manifest, writer.status.read_entries)
            require_covered(root, writer.manifest, writer.status.entries)
        except BaseException:
            lock.release()
            raise
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokens(self, rows: range) -> Tensor:
        """Return the token ids of consecutive sequences, int32, [n, n_ctx]."""
        return self._tokens.read(rows)

    def missing_shards(self) -> list[int]:
        """Read the status again and return the shards that miss a file."""
        self.status.refresh()
        return self.status.missing_shards(self.manifest.sites)

    def claimed_shards(
        self, waiting: Callable[[int], None] = lambda n_shards: None
    ) -> Iterator[int]:
        """Yield missing shards one by one, each claimed until it is committed or left unwritten.

        In the end it waits for the shards of other processes, and takes over those of dead ones.

        Args:
            waiting: called, again and again, with how many shards of others it waits for.
        """

        def wait(n_shards: int) -> None:
            self.settle()  # which others may be waiting for
            waiting(n_shards)

        for shard, claim in claim_shards(self._lock, self.status, self.sites_to_write, wait):
            self._claims[shard], self._lent = claim, shard
            try:
                yield shard
            finally:
                self._lent = None
                if shard not in self.unsettled and self._open is None:
                    self._release(shard)
        self.settle()

    @contextmanager
    def shard(
        self, shard: int, *, keep_nonfinite: bool = False, wait: bool = True
    ) -> Iterator[ShardSession]:
        """Write the missing sites of one shard; nothing is committed if the block raises.

        Args:
            shard: number of the shard.
            keep_nonfinite: whether NaN and Inf are counted and kept; otherwise they are refused.
            wait: whether the shard is committed when the block ends; otherwise a later `settle`
                commits it.

        Raises:
            BusyError: another process writes it.
        """
        if shard not in self._claims:
            claim = self._lock.claim(str(shard))
            if claim is None:
                raise BusyError(f"shard {shard} of {self.root} is being written by another process")
            self._claims[shard] = claim
        try:
            self._open = ShardSession(
                self.root,
                self.manifest,
                shard,
                given=self.sites_to_write,
                sites=self.begin_shard(shard),
                queue=self._queue,
                channels=self._all_channels(),
                keep_nonfinite=keep_nonfinite,
                record=self._log.commit,
            )
            yield self._open
            self._lock.require_held()
            self._open.finish()
            self._unsettled.append(self._open)
            self._open = None
        except BaseException as error:
            self._abandon(shard, error)
            raise
        if wait:
            self.settle()

    @property
    def unsettled(self) -> list[int]:
        """Shards whose writes are queued and that are not yet committed."""
        return [session.shard for session in self._unsettled]

    def settle(self, *, wait: bool = True) -> None:
        """Commit the shards that were appended in full.

        Args:
            wait: whether to wait for the disk; otherwise only shards that are on it are committed.
        """
        while self._unsettled and (wait or self._unsettled[0].is_done):
            session = self._unsettled.pop(0)
            try:
                self.status.record(session.entries())
            finally:
                self._release(session.shard)

    def _abandon(self, shard: int | None, error: BaseException | None = None) -> None:
        """Drop a shard that was interrupted; commit the earlier ones that are on the disk.

        Claims are released when nothing is written under them any more. The claim of the shard that
        `claimed_shards` has yielded stays: the shard may be tried again.

        Raises:
            BaseException: the error of an earlier shard, if it is not the error at hand.
        """
        failure = self._queue.reset()
        if self._open is not None:
            self._open.discard()
            self._open = None
        if shard is not None and shard != self._lent:
            self._release(shard)
        done = [session for session in self._unsettled if session.is_done]
        dropped = [session for session in self._unsettled if not session.is_done]
        self._unsettled = done
        for session in dropped:
            session.discard()
            self._release(session.shard)
        with suppress(Exception):  # the first error is raised
            self.settle()
        if dropped and failure is not None and failure is not error:
            raise failure from error

    def _release(self, shard: int) -> None:
        if (claim := self._claims.pop(shard, None)) is not None:
            claim.release()

    def begin_shard(self, shard: int) -> list[Site]:
        """Return the sites that a claimed shard lacks; see `CommitLog.begin_shard`."""
        return self._log.begin_shard(shard, self.sites_to_write)

    def commit(self, entries: list[Entry]) -> None:
        """Commit files of a shard that were written without a session."""
        if entries:
            self._log.commit(entries)
            self.status.record(entries)

    def finish(self) -> None:
        """Write shards.parquet and, last of all, manifest.json, unless another process has.

        Raises:
            StoreError: shards are missing.
        """
        self.settle()
        self._log.finish()

    def close(self) -> None:
        """Release the lock; shards that are not settled are dropped unless they are on the disk."""
        try:
            if self._open is not None or self._unsettled:
                self._abandon(None)
        finally:
            self._queue.close()
            for shard in list(self._claims):
                self._release(shard)
            self._lock.release()

    @property
    def peak_buffer_bytes(self) -> int:
        """Most bytes of activations that waited for the disk at a time."""
        return self._queue.peak_bytes

    def _all_channels(self) -> dict[str, Tensor]:
        """Return the scales of int8's channels by array, float32, [width]; they are read once."""
        if not self._channels:
            for site in self.sites_to_write:
                if is_int8(self.manifest, site):
                    self._channels[site.path] = read_channel(self.root, self.manifest, site)
        return self._channels
