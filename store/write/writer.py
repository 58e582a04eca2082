"""Write a store shard by shard, each whole or not at all, by any number of processes at once.

    with StoreWriter.create(path, manifest, tokens=..., ...) as writer:
        for shard in writer.claimed_shards():
            with writer.shard(shard) as session:
                session.append({layer: (x, y), ...})      # a few sequences at a time, in order
        writer.finish()                                   # shards.parquet, then manifest.json

A shard is committed when its block ends without an exception: its files are flushed and renamed,
then one line in the journal says so. Whatever was not committed leaves nothing that a reader would
take for data, and `StoreWriter.resume` goes on at the first missing shard, also beside others that
write: a shard is claimed by one process at a time, and free again when that ends, however it ends.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Self

from torch import Tensor

from ...errors import BusyError, StoreError
from ..entries import Entry, write_table
from ..folder import is_begun, is_complete, repair_command, require_covered, why_not_a_store
from ..journal import JournalWriter
from ..layout import layer_arrays, read_channel, sites, text_arrays
from ..locks.lock import LOCK_WAIT_S, Claim, Lock, take_lock
from ..manifest import MANIFEST, PLAN, Manifest, read_manifest
from ..places import Place, sync, write_atomically
from ..read.rows import RowReader
from .claims import claim_shards, claimed
from .create import create_layers, create_store
from .session import ShardSession
from .status import ShardStatus
from .write_queue import WriteQueue

BUFFER_BYTES = 4 << 30
"""Most bytes of activations that may wait for the disk before the model has to."""
FINISH = "finish"
"""Name of the claim under which a store becomes finished, or unfinished again."""


class StoreWriter:
    """The only way in which a store changes. Use it in a `with` block, which ends its lock."""

    def __init__(
        self,
        root: Place,
        manifest: Manifest,
        lock: Lock,
        *,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Use `create`, `resume` or `add_layers`."""
        self.root = root
        self.manifest = manifest
        self._lock = lock
        tokens, _ = text_arrays(manifest)
        self._tokens = RowReader(root, tokens, n_seq=manifest.n_seq, shard_seqs=manifest.shard_seqs)
        self._journal = JournalWriter(root)
        self._turn = threading.Lock()
        """Of those that write to the journal."""
        self._queue = WriteQueue(buffer_bytes)
        self._channels: dict[str, Tensor] = {}
        self._claims: dict[int, Claim] = {}
        self._lent: int | None = None
        """The shard that `claimed_shards` has given out."""
        self._open: ShardSession | None = None
        self._unsettled: list[ShardSession] = []
        self.status = ShardStatus(root, manifest)
        """What is there and what is not, as of the last look."""
        self.status.require_readable()
        self.layers_to_write = [n for n in manifest.layers if self.status.missing_shards([n])]
        """The layers that some shard lacked when this process joined: those of a batch."""

    @classmethod
    def create(
        cls,
        root: Place,
        manifest: Manifest,
        *,
        tokens: Tensor,
        documents: Tensor,
        document_names: list[str],
        weights: dict[int, dict[str, Tensor]],
        sample: Mapping[int, Sequence[Tensor]] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> Self:
        """Begin a store: its metadata, token ids and weights; the plan last. Then join.

        Args:
            root: nothing that exists, an empty folder, or one with a store that was never begun;
                or a place in a bucket.
            manifest: what the store will be.
            tokens, documents: int32, [n_seq, n_ctx].
            document_names: names of the documents that `documents` numbers.
            weights: for every layer its own parameters by name.
            sample: for every layer some x and, if it is stored, y, [..., d_model]; int8 takes the
                scales of its channels from them, other dtypes need none.
            buffer_bytes: most bytes of activations that may wait for the disk.

        Raises:
            BegunError: another process has begun a store here meanwhile: `resume` joins it.
            StoreError: the folder holds something else, or the disk is full.
            ValueError: tokens, documents or weights are not those of the manifest.
        """
        create_store(
            root,
            manifest,
            tokens=tokens,
            documents=documents,
            document_names=document_names,
            weights=weights,
            sample=sample or {},
        )
        return cls.resume(root, buffer_bytes=buffer_bytes)

    @classmethod
    def add_layers(
        cls,
        root: Place,
        layers: Mapping[int, dict[str, Any]],
        *,
        weights: dict[int, dict[str, Tensor]],
        sample: Mapping[int, Sequence[Tensor]] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> Self:
        """Begin to add layers to a finished store, which stays readable as it is. Then join.

        Args:
            root: its place.
            layers: their facts, as a manifest has them.
            weights, sample, buffer_bytes: as for `create`, of these layers.

        Raises:
            BegunError: another process has begun to add them meanwhile: `resume` joins it; or some
                are there already.
            StoreError: the store is unfinished, given other layers or being written.
            ValueError: weights or sample are not those of the layers.
        """
        create_layers(root, layers, weights=weights, sample=sample or {})
        return cls.resume(root, buffer_bytes=buffer_bytes)

    @classmethod
    def resume(cls, root: Place, *, buffer_bytes: int = BUFFER_BYTES) -> Self:
        """Go on with a store that was begun, beside any others that write it.

        Args:
            root: its folder.
            buffer_bytes: most bytes of activations that may wait for the disk.

        Raises:
            BusyError: the store is being begun, mended or rid of layers, for a minute already.
            StoreError: there is none, or journal or token ids are damaged.
        """
        if not is_begun(root):
            gone = f"{root} has no {PLAN} any more; write it anew with: {repair_command(root)}"
            raise StoreError(gone if is_complete(root) else why_not_a_store(root))
        lock = take_lock(root, exclusive=False, wait_s=LOCK_WAIT_S)
        try:
            writer = cls(root, read_manifest(root / PLAN), lock, buffer_bytes=buffer_bytes)
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
        """Return the token ids of a run of sequences, int32, [n, n_ctx]."""
        return self._tokens.read(rows)

    def missing_shards(self) -> list[int]:
        """Return the shards of which some file is not committed, or no longer there, by now."""
        self.status.refresh()
        return self.status.missing_shards(self.manifest.layers)

    def claimed_shards(
        self, waiting: Callable[[int], None] = lambda n_shards: None
    ) -> Iterator[int]:
        """Yield missing shards one by one, each claimed until it is committed or left unwritten.

        In the end it waits for what others have claimed, and takes over what a dead one leaves.

        Args:
            waiting: told, again and again, for how many shards of others it waits.
        """

        def wait(n_shards: int) -> None:
            self.settle()  # which others may be waiting for
            waiting(n_shards)

        for shard, claim in claim_shards(self._lock, self.status, self.layers_to_write, wait):
            self._claims[shard], self._lent = claim, shard
            try:
                yield shard
            finally:
                self._lent = None
                if shard not in self.unsettled and self._open is None:
                    self._let_go(shard)
        self.settle()

    @contextmanager
    def shard(
        self, shard: int, *, keep_nonfinite: bool = False, wait: bool = True
    ) -> Iterator[ShardSession]:
        """Write what one shard lacks; nothing of it is committed if the block raises.

        Args:
            shard: which.
            keep_nonfinite: whether NaN and Inf are counted and kept; otherwise they are refused.
            wait: whether the shard is committed when the block ends; otherwise a later `settle`
                commits it, once the disk has it.

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
                given=self.layers_to_write,
                layers=self.begin_shard(shard),
                queue=self._queue,
                channels=self._all_channels(),
                keep_nonfinite=keep_nonfinite,
                record=self._record,
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
        """Shards that were written and wait for the disk to be committed."""
        return [session.shard for session in self._unsettled]

    def settle(self, *, wait: bool = True) -> None:
        """Commit the shards that were written.

        Args:
            wait: whether to wait for the disk; otherwise those that it has are committed.
        """
        while self._unsettled and (wait or self._unsettled[0].is_done):
            session = self._unsettled.pop(0)
            try:
                self.status.record(session.entries())
            finally:
                self._let_go(session.shard)

    def _abandon(self, shard: int | None, error: BaseException | None = None) -> None:
        """Drop a shard that was cut short; of those before it, commit what the disk takes.

        Claims are released when nothing can be written under them any more, but for the one that
        `claimed_shards` has given out: its shard may be tried again.

        Raises:
            BaseException: what went wrong with one before, if it is not the error at hand.
        """
        failure = self._queue.reset()
        if self._open is not None:
            self._open.discard()
            self._open = None
        if shard is not None and shard != self._lent:
            self._let_go(shard)
        done = [session for session in self._unsettled if session.is_done]
        dropped = [session for session in self._unsettled if not session.is_done]
        self._unsettled = done
        for session in dropped:
            session.discard()
            self._let_go(session.shard)
        with suppress(Exception):  # the first error is told
            self.settle()
        if dropped and failure is not None and failure is not error:
            raise failure from error

    def _let_go(self, shard: int) -> None:
        if (claim := self._claims.pop(shard, None)) is not None:
            claim.release()

    def begin_shard(self, shard: int) -> list[int]:
        """Return the layers that a claimed shard lacks, and forget what is committed of them.

        A kill may leave new files with old checksums. A finished store that had such a layer is
        unfinished from here on: its table has the old ones too.
        """
        self.status.read()
        layers = self.status.missing_layers(shard, self.layers_to_write)
        keys = {(shard, s.name) for layer in layers for s in layer_arrays(self.manifest, layer)}
        if (last := self.status.last_mention(keys)) is not None:
            with self._turn:
                self._journal.come_after(last)
        if stale := keys & self.status.entries.keys():
            with self._finishing():
                self._lock.require_held()
                if is_complete(self.root) and (
                    set(layers) & set(read_manifest(self.root / MANIFEST).layers)
                ):
                    (self.root / MANIFEST).unlink()
                    sync(self.root)
                with self._turn:
                    self._journal.drop(stale)
        return layers

    def commit(self, entries: list[Entry]) -> None:
        """Commit files of a shard that were written and put in their place otherwise."""
        if entries:
            self._record(entries)
            self.status.record(entries)

    def _record(self, entries: list[Entry]) -> None:
        """Write the journal's line of a shard; in the thread that wrote its files, as a rule."""
        with self._turn:
            self._lock.require_held()
            self._journal.commit(entries)

    def finish(self) -> None:
        """Write shards.parquet and, last of all, manifest.json, unless another process has.

        Raises:
            StoreError: shards are missing.
        """
        self.settle()
        with self._finishing():
            missing = self.missing_shards()
            if missing:
                raise StoreError(f"{self.root} lacks {len(missing)} shards; run the harvest again")
            try:
                self._lock.require_held()
                if not self.status.is_finished():
                    write_table(self.root, self.status.rows())
                    write_atomically(self.root / MANIFEST, self.manifest.to_json())
                self._lock.sweep()
            except OSError as error:
                raise StoreError(
                    f"{self.root} cannot be finished ({error.strerror}); all shards are safe: "
                    "make room and run the same command again"
                ) from None

    def close(self) -> None:
        """Let others write; what was written and not settled is dropped unless the disk has it."""
        try:
            if self._open is not None or self._unsettled:
                self._abandon(None)
        finally:
            self._queue.close()
            for shard in list(self._claims):
                self._let_go(shard)
            self._lock.release()

    @property
    def peak_buffer_bytes(self) -> int:
        """The most bytes of activations that waited for the disk at a time."""
        return self._queue.peak_bytes

    def _finishing(self) -> AbstractContextManager[None]:
        busy = f"{self.root} is being finished by another process; run the same command again"
        return claimed(self._lock, FINISH, LOCK_WAIT_S, busy=busy)

    def _all_channels(self) -> dict[str, Tensor]:
        """Return the scales of int8's channels by array, read once."""
        if self.manifest.dtype == "int8" and not self._channels:
            for layer in self.layers_to_write:
                for site in sites(self.manifest, layer):
                    self._channels[site] = read_channel(self.root, self.manifest, site)
        return self._channels
