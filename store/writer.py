"""Write a store shard by shard, each whole or not at all.

    with StoreWriter.create(path, manifest, tokens=..., ...) as writer:
        for shard in writer.missing_shards():
            with writer.shard(shard) as session:
                session.append({layer: (x, y), ...})      # a few sequences at a time, in order
        writer.finish()                                   # shards.parquet, then manifest.json

A shard is committed when its block ends without an exception: its files are flushed and renamed,
then one line in the journal says so. Whatever was not committed leaves nothing that a reader would
take for data, and `StoreWriter.resume` goes on at the first missing shard.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

from torch import Tensor

from .behind import WriteBehind
from .encoding import channel_scale, to_disk
from .errors import StoreError
from .folder import clear, is_complete, missing_shards, require_covered, require_free
from .journal import (
    TEXT,
    Entry,
    JournalWriter,
    Lock,
    read_journal,
    take_lock,
    write_table,
)
from .layout import (
    ArraySpec,
    all_arrays,
    channel_of,
    create_arrays,
    read_channel,
    sites,
    text_arrays,
    write_documents,
    write_weights,
    write_whole,
)
from .lease import Lease
from .manifest import MANIFEST, PLAN, Manifest, read_manifest
from .places import Place, sync, sync_tree, unmade_folders, write_atomically
from .rows import RowReader
from .session import ShardSession
from .shard import ShardWriter

BUFFER_BYTES = 4 << 30
"""Most bytes of activations that may wait for the disk before the model has to."""


class StoreWriter:
    """The only way in which a store changes. Use it in a `with` block, which ends its lock."""

    def __init__(
        self,
        root: Place,
        manifest: Manifest,
        lock: Lock | Lease,
        *,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Use `create` or `resume`."""
        self.root = root
        self.manifest = manifest
        self._lock = lock
        self._arrays = all_arrays(manifest)
        self._tokens = RowReader(
            root, self._arrays["tokens"], n_seq=manifest.n_seq, shard_seqs=manifest.shard_seqs
        )
        self._committed = {(e.shard, e.array): e for e in read_journal(root)}
        self._journal = JournalWriter(root)
        self._behind = WriteBehind(buffer_bytes)
        self._channels: dict[str, Tensor] = {}
        self._finished = is_complete(root)

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
        """Begin a store: its metadata, token ids and weights; the plan last.

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
            StoreError: the folder holds something else, is being written, or the disk is full.
            ValueError: tokens, documents or weights are not those of the manifest.
        """
        shape = (manifest.n_seq, manifest.n_ctx)
        if tokens.shape != shape or documents.shape != shape:
            raise ValueError(
                f"tokens and documents are {tuple(tokens.shape)} and {tuple(documents.shape)}, "
                f"not {shape}"
            )
        if {layer: sorted(own) for layer, own in weights.items()} != {
            layer: sorted(facts["weights"]) for layer, facts in manifest.layers.items()
        }:
            raise ValueError("weights are not those that the manifest names")
        if manifest.dtype == "int8" and set(sample or {}) != set(manifest.layers):
            raise ValueError("int8 needs a sample of every layer")
        require_free(root)
        unmade = unmade_folders(root)
        lock = take_lock(root)
        try:
            require_free(root)  # another writer may have been quicker
            clear(root)
            create_arrays(root, manifest)
            for layer, parameters in weights.items():
                write_weights(root, layer, parameters)
            write_documents(root, document_names)
            writer = cls(root, manifest, lock, buffer_bytes=buffer_bytes)
            writer._write_channels(sample or {})
            for spec, values in zip(text_arrays(manifest), (tokens, documents), strict=True):
                writer._write_text(spec, values)
            sync_tree(root)
            for folder in unmade:  # a power cut would take their names
                sync(folder.parent)
            write_atomically(root / PLAN, manifest.to_json())
        except OSError as error:
            lock.release()
            raise StoreError(f"{root} cannot be written ({error.strerror})") from None
        except BaseException:
            lock.release()
            raise
        return writer

    @classmethod
    def resume(cls, root: Place, *, buffer_bytes: int = BUFFER_BYTES) -> Self:
        """Go on with a store that `create` began.

        Args:
            root: its folder.
            buffer_bytes: most bytes of activations that may wait for the disk.

        Raises:
            StoreError: there is none, it is being written, or journal or token ids are damaged.
        """
        lock = take_lock(root)
        try:
            writer = cls(root, read_manifest(root / PLAN), lock, buffer_bytes=buffer_bytes)
            require_covered(root, writer.manifest, writer._committed)
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
        """Return the shards of which some file is not committed or no longer there."""
        return missing_shards(self.root, self.manifest, self._committed, self._arrays.values())

    @contextmanager
    def shard(self, shard: int, *, keep_nonfinite: bool = False) -> Iterator[ShardSession]:
        """Write one shard of every layer; committed if the block ends without an exception.

        Args:
            shard: which.
            keep_nonfinite: whether NaN and Inf are counted and kept; otherwise they are refused.
        """
        self._drop(shard)
        session = ShardSession(
            self.root,
            self.manifest,
            shard,
            behind=self._behind,
            channels=self._all_channels(),
            keep_nonfinite=keep_nonfinite,
        )
        try:
            yield session
            self._lock.require_held()
            entries = session.finish()
        except BaseException:
            session.discard()
            raise
        self._commit(self._journal, entries)

    def commit(self, entries: list[Entry]) -> None:
        """Commit all files of a shard that were written and put in their place otherwise."""
        self._commit(self._journal, entries)

    def finish(self) -> None:
        """Write shards.parquet and, last of all, manifest.json.

        Raises:
            StoreError: shards are missing.
        """
        missing = self.missing_shards()
        if missing:
            raise StoreError(f"{self.root} lacks {len(missing)} shards; run the harvest again")
        try:
            self._lock.require_held()
            write_table(self.root, self._committed.values())
            write_atomically(self.root / MANIFEST, self.manifest.to_json())
            self._finished = True
        except OSError as error:
            raise StoreError(
                f"{self.root} cannot be finished ({error.strerror}); all shards are safe: "
                "make room and run the same command again"
            ) from None

    def close(self) -> None:
        """Let others write."""
        self._behind.close()
        self._lock.release()

    @property
    def peak_buffer_bytes(self) -> int:
        """The most bytes of activations that waited for the disk at a time."""
        return self._behind.peak_bytes

    def _write_channels(self, sample: Mapping[int, Sequence[Tensor]]) -> None:
        if self.manifest.dtype != "int8":
            return
        for layer, pair in sample.items():
            for site, values in zip(sites(self.manifest, layer), pair, strict=False):
                write_whole(self.root, channel_of(site), channel_scale(values))

    def _all_channels(self) -> dict[str, Tensor]:
        """Return the scales of int8's channels by array, read once."""
        if self.manifest.dtype == "int8" and not self._channels:
            for layer in self.manifest.layers:
                for site in sites(self.manifest, layer):
                    self._channels[site] = read_channel(self.root, self.manifest, site)
        return self._channels

    def _commit(self, journal: JournalWriter, entries: list[Entry]) -> None:
        self._lock.require_held()
        journal.commit(entries)
        self._committed |= {(e.shard, e.array): e for e in entries}

    def _drop(self, shard: int) -> None:
        """Forget a shard that is written anew: a kill may leave new files with old checksums.

        A complete store is unfinished from here on: its table has the old ones too.
        """
        given = {spec.name for spec in text_arrays(self.manifest)}
        stale = [key for key in self._committed if key[0] == shard and key[1] not in given]
        if self._finished or stale:
            self._lock.require_held()
        if self._finished:
            (self.root / MANIFEST).unlink()
            sync(self.root)
            self._finished = False
        if stale:
            self._journal.drop(stale)
            for key in stale:
                del self._committed[key]

    def _write_text(self, spec: ArraySpec, values: Tensor) -> None:
        journal = JournalWriter(self.root, TEXT)
        entries = []
        for shard in range(self.manifest.n_shards):
            rows = self.manifest.shard_rows(shard)
            file = ShardWriter(spec.shard_path(self.root, shard), n_chunks=self.manifest.shard_seqs)
            try:
                file.append(to_disk(values[rows.start : rows.stop], spec.dtype))
                done = file.commit()
            except BaseException:
                file.discard()
                raise
            n_bytes, crc32c = done
            entries.append(Entry(shard, spec.name, len(rows), n_bytes, crc32c, 0.0, 0.0))
        self._commit(journal, entries)
