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

import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from .encoding import Array, from_disk, to_disk
from .errors import StoreError
from .journal import (
    JOURNAL,
    LOCK,
    TABLE,
    TEXT,
    Entry,
    JournalWriter,
    Lock,
    read_journal,
    write_table,
)
from .layout import (
    DOCUMENTS,
    ArraySpec,
    all_arrays,
    attn_in,
    attn_out,
    create_arrays,
    layer_arrays,
    norms,
    text_arrays,
    write_documents,
    write_weights,
)
from .manifest import MANIFEST, PLAN, Manifest, read_manifest, sync_tree, write_atomically
from .rows import RowReader
from .shard import ShardWriter

OUR_NAMES = {JOURNAL, DOCUMENTS, TABLE, "zarr.json", "tokens", "documents", "layers", "weights"}
"""What an unfinished store may hold."""
MAX_WAITING_BATCHES = 2
"""Batches that may wait for the disk before the model has to."""


def is_complete(root: Path) -> bool:
    """Tell whether a folder holds a finished store."""
    return (root / MANIFEST).exists()


def is_begun(root: Path) -> bool:
    """Tell whether a folder holds a store whose harvest can go on."""
    return (root / PLAN).exists()


class StoreWriter:
    """The only way in which a store changes. Use it in a `with` block, which ends its lock."""

    def __init__(self, root: Path, manifest: Manifest, lock: Lock) -> None:
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

    @classmethod
    def create(
        cls,
        root: Path,
        manifest: Manifest,
        *,
        tokens: Tensor,
        documents: Tensor,
        document_names: list[str],
        weights: dict[int, dict[str, Tensor]],
    ) -> Self:
        """Begin a store: its metadata, token ids and weights; the plan last.

        Args:
            root: a folder that does not exist, is empty, or holds a store that was never begun.
            manifest: what the store will be.
            tokens, documents: int32, [n_seq, n_ctx].
            document_names: names of the documents that `documents` numbers.
            weights: for every layer its own parameters by name.

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
        require_free(root)
        lock = Lock(root)
        try:
            require_free(root)  # another writer may have been quicker
            _clear(root)
            create_arrays(root, manifest)
            for layer, parameters in weights.items():
                write_weights(root, layer, parameters)
            write_documents(root, document_names)
            writer = cls(root, manifest, lock)
            for spec, values in zip(text_arrays(manifest), (tokens, documents), strict=True):
                writer._write_text(spec, values)
            sync_tree(root)
            write_atomically(root / PLAN, manifest.to_json())
        except OSError as error:
            lock.release()
            raise StoreError(f"{root} cannot be written ({error.strerror})") from None
        except BaseException:
            lock.release()
            raise
        return writer

    @classmethod
    def resume(cls, root: Path) -> Self:
        """Go on with a store that `create` began.

        Raises:
            StoreError: there is none, it is being written, or its token ids are damaged.
        """
        lock = Lock(root)
        try:
            writer = cls(root, read_manifest(root / PLAN), lock)
            texts = text_arrays(writer.manifest)
            if any(writer._missing([spec.name for spec in texts])):
                raise StoreError(f"{root} lacks token ids; delete it and harvest again")
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
        return self._missing(list(self._arrays))

    @contextmanager
    def shard(self, shard: int) -> Iterator["ShardSession"]:
        """Write one shard of every layer; committed if the block ends without an exception."""
        self._drop(shard)
        session = ShardSession(self.root, self.manifest, shard)
        try:
            yield session
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
            write_table(self.root, self._committed.values())
            write_atomically(self.root / MANIFEST, self.manifest.to_json())
        except OSError as error:
            raise StoreError(
                f"{self.root} cannot be finished ({error.strerror}); all shards are safe: "
                "make room and run the same command again"
            ) from None

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def _missing(self, names: list[str]) -> list[int]:
        return [
            shard
            for shard in range(self.manifest.n_shards)
            if not all(self._is_there(shard, name) for name in names)
        ]

    def _is_there(self, shard: int, name: str) -> bool:
        entry = self._committed.get((shard, name))
        path = self._arrays[name].shard_path(self.root, shard)
        return entry is not None and path.is_file() and path.stat().st_size == entry.n_bytes

    def _commit(self, journal: JournalWriter, entries: list[Entry]) -> None:
        journal.commit(entries)
        self._committed |= {(e.shard, e.array): e for e in entries}

    def _drop(self, shard: int) -> None:
        """Forget a shard that is written anew: a kill may leave new files with old checksums."""
        given = {spec.name for spec in text_arrays(self.manifest)}
        stale = [key for key in self._committed if key[0] == shard and key[1] not in given]
        if stale:
            self._journal.drop(stale)
            for key in stale:
                del self._committed[key]

    def _write_text(self, spec: ArraySpec, values: Tensor) -> None:
        journal = JournalWriter(self.root, TEXT)
        for shard in range(self.manifest.n_shards):
            rows = self.manifest.shard_rows(shard)
            file = ShardWriter(spec.shard_path(self.root, shard), n_chunks=self.manifest.shard_seqs)
            try:
                file.append(to_disk(values[rows.start : rows.stop], spec.dtype))
                done = file.commit()
            except BaseException:
                file.discard()
                raise
            entry = Entry(shard, spec.name, len(rows), done.n_bytes, done.crc32c, 0.0, 0.0)
            self._commit(journal, [entry])


def is_hardly_begun(root: Path) -> bool:
    """Tell whether a folder holds a store whose making was cut short before there was a plan."""
    return (
        (root / JOURNAL / LOCK).is_file()
        and not is_begun(root)
        and not is_complete(root)
        and all(_is_ours(path.name) for path in root.iterdir())
    )


def _is_ours(name: str) -> bool:
    # zarr writes zarr.json under a name such as zarr.923bf3cc.partial, which a kill leaves behind
    return name in OUR_NAMES or (name.startswith("zarr.") and name.endswith(".partial"))


def require_free(root: Path) -> None:
    """Raise StoreError unless a new store may be made here.

    A store whose making was cut short before there was a plan is in nobody's way.
    """
    if root.is_dir():
        if any(root.iterdir()) and not is_hardly_begun(root):
            raise StoreError(f"{root} is a folder with other things in it; choose an empty one")
    elif root.exists():
        raise StoreError(f"{root} is a file; choose a folder")
    parent = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StoreError(f"{root} cannot be made in {parent}; choose another folder")


def _clear(root: Path) -> None:
    """Remove what a store that was hardly begun has left; the lock is held."""
    for path in root.iterdir():
        if path.name == JOURNAL:
            for file in path.glob("*.jsonl"):
                file.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


class ShardSession:
    """Takes the sequences of one shard; a thread writes them behind the model's back."""

    def __init__(self, root: Path, manifest: Manifest, shard: int) -> None:
        self._shard = shard
        self._manifest = manifest
        self._rows = manifest.shard_rows(shard)
        self._specs = {
            spec.name: spec for layer in manifest.layers for spec in layer_arrays(manifest, layer)
        }
        self._files: dict[str, ShardWriter] = {}
        self._root = root
        self._sums = {name: [0.0, 0.0] for name in self._specs}
        self._n_appended = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lorsa-writer")
        self._waiting: deque[Future[None]] = deque()

    def append(self, batch: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Take the next sequences.

        Args:
            batch: for every layer x and y, each [n, n_ctx, d_model].

        Raises:
            ValueError: layers or shapes are not those of the store.
            StoreError: the values are not finite, or the disk did not take an earlier batch.
        """
        n_seqs = self._require_fit(batch)
        first = self._rows.start + self._n_appended
        rows: dict[str, Array] = {}
        for layer, pair in batch.items():
            rows |= self._encode(layer, pair, first)
        self._n_appended += n_seqs
        while len(self._waiting) >= MAX_WAITING_BATCHES:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, rows))

    def finish(self) -> list[Entry]:
        """Wait for the disk, commit the files and return their journal entries."""
        while self._waiting:
            self._waiting.popleft().result()
        n_seqs = len(self._rows)
        if self._n_appended != n_seqs:
            raise ValueError(
                f"shard {self._shard} has {n_seqs} sequences; {self._n_appended} were appended"
            )
        self._pool.shutdown()
        entries = []
        for name, file in self._files.items():
            done = file.commit()
            sums = self._sums[name]
            entries.append(Entry(self._shard, name, n_seqs, done.n_bytes, done.crc32c, *sums))
        return entries

    def discard(self) -> None:
        """Drop what was written."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.discard()

    def _require_fit(self, batch: dict[int, tuple[Tensor, Tensor]]) -> int:
        """Return the number of sequences of a batch that fits the store."""
        if set(batch) != set(self._manifest.layers):
            raise ValueError(
                f"the batch has layers {sorted(batch)}, the store {sorted(self._manifest.layers)}"
            )
        shapes = {tuple(values.shape) for pair in batch.values() for values in pair}
        n_seqs = next(iter(shapes))[0]
        expected = (n_seqs, self._manifest.n_ctx, self._manifest.d_model)
        if shapes != {expected}:
            raise ValueError(f"x and y must all be {list(expected)}; there is {sorted(shapes)}")
        if self._n_appended + n_seqs > len(self._rows):
            raise ValueError(
                f"shard {self._shard} has {len(self._rows)} sequences; "
                f"{self._n_appended + n_seqs} were appended"
            )
        return n_seqs

    def _encode(self, layer: int, pair: tuple[Tensor, Tensor], first_seq: int) -> dict[str, Array]:
        """Return a layer's arrays as they lie on disk, and add up their norms."""
        rows, token_norms = {}, []
        for name, values in zip((attn_in(layer), attn_out(layer)), pair, strict=True):
            dtype = self._specs[name].dtype
            rows[name] = to_disk(values, dtype)
            norm = from_disk(rows[name], dtype).float().norm(dim=-1)  # [n, n_ctx]
            self._require_finite(name, values, norm, first_seq)
            self._sums[name][0] += norm.double().sum().item()
            self._sums[name][1] += norm.double().square().sum().item()
            token_norms.append(norm)
        rows[norms(layer)] = to_disk(torch.stack(token_norms, dim=-1), "float32")  # [n, n_ctx, 2]
        return rows

    def _write(self, rows: dict[str, Array]) -> None:
        """Write in the thread, which moves bytes only; see `loader` for why."""
        for name, values in rows.items():
            if name not in self._files:
                spec = self._specs[name]
                path = spec.shard_path(self._root, self._shard)
                self._files[name] = ShardWriter(
                    path, n_chunks=self._manifest.shard_seqs, codec=spec.codec
                )
            self._files[name].append(values)

    def _require_finite(self, name: str, values: Tensor, norm: Tensor, first_seq: int) -> None:
        good = norm.isfinite().all(dim=-1)  # [n]
        if good.all():
            return
        seq = first_seq + int(good.int().argmin())
        if values.isfinite().all():
            raise StoreError(
                f"{name} of sequence {seq} does not fit {self._specs[name].dtype}; "
                "use --dtype bfloat16"
            )
        raise StoreError(
            f"{name} of sequence {seq} is not finite (NaN or Inf from the model); "
            "try --model-dtype float32, or check the model with a short prompt"
        )
