"""Write a store shard by shard, each whole or not at all.

    writer = StoreWriter.create(path, manifest, tokens=..., ...)
    for shard in writer.missing_shards():
        with writer.shard(shard) as session:
            session.append({layer: (x, y), ...})      # a few sequences at a time, in order
    writer.finish()                                   # shards.parquet, then manifest.json

A shard is committed when its block ends without an exception: its files are flushed and renamed,
then one line in the journal says so. Whatever was not committed leaves nothing that a reader would
take for data, and `StoreWriter.resume` goes on at the first missing shard.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .encoding import Array, from_disk, to_disk
from .errors import StoreError
from .journal import JOURNAL, Entry, JournalWriter, Lock, read_journal, write_table
from .layout import (
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
from .manifest import MANIFEST, PLAN, Manifest, read_manifest, write_atomically
from .rows import RowReader
from .shard import ShardWriter

MAX_WAITING_BATCHES = 2
"""Batches that may wait for the disk before the model has to."""


def is_complete(root: Path) -> bool:
    """Tell whether a folder holds a finished store."""
    return (root / MANIFEST).exists()


def is_begun(root: Path) -> bool:
    """Tell whether a folder holds a store whose harvest can go on."""
    return (root / PLAN).exists()


class StoreWriter:
    """The only way in which a store changes."""

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
    ) -> "StoreWriter":
        """Begin a store: its metadata, token ids and weights; the plan last.

        Args:
            root: a folder that does not exist, is empty, or holds a store that was never begun.
            manifest: what the store will be.
            tokens, documents: int32, [n_seq, n_ctx].
            document_names: names of the documents that `documents` numbers.
            weights: for every layer its own parameters by name.

        Raises:
            StoreError: the folder holds something else, or is being written.
        """
        require_free(root)
        lock = Lock(root)
        create_arrays(root, manifest)
        for layer, parameters in weights.items():
            write_weights(root, layer, parameters)
        write_documents(root, document_names)
        for stale in (root / JOURNAL).glob("*.jsonl"):
            stale.unlink()
        writer = cls(root, manifest, lock)
        for spec, values in zip(text_arrays(manifest), (tokens, documents), strict=True):
            writer._write_text(spec, values)
        write_atomically(root / PLAN, manifest.to_json())
        return writer

    @classmethod
    def resume(cls, root: Path) -> "StoreWriter":
        """Go on with a store that `create` began.

        Raises:
            StoreError: there is none, or it is being written.
        """
        lock = Lock(root)
        return cls(root, read_manifest(root / PLAN), lock)

    def tokens(self, rows: range) -> Tensor:
        """Return the token ids of a run of sequences, int32, [n, n_ctx]."""
        return self._tokens.read(rows)

    def missing_shards(self) -> list[int]:
        """Return the shards of which some array is not committed."""
        names = self._arrays
        return [
            shard
            for shard in range(self.manifest.n_shards)
            if any((shard, name) not in self._committed for name in names)
        ]

    @contextmanager
    def shard(self, shard: int) -> Iterator["ShardSession"]:
        """Write one shard of every layer; committed if the block ends without an exception."""
        session = ShardSession(self.root, self.manifest, shard)
        try:
            yield session
            entries = session.finish()
        except BaseException:
            session.discard()
            raise
        self._commit(entries)

    def finish(self) -> None:
        """Write shards.parquet and, last of all, manifest.json.

        Raises:
            StoreError: shards are missing.
        """
        missing = self.missing_shards()
        if missing:
            raise StoreError(f"{self.root} lacks {len(missing)} shards; run the harvest again")
        write_table(self.root, self._committed.values())
        write_atomically(self.root / MANIFEST, self.manifest.to_json())
        self.close()

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def _commit(self, entries: list[Entry]) -> None:
        self._journal.commit(entries)
        self._committed |= {(e.shard, e.array): e for e in entries}

    def _write_text(self, spec: ArraySpec, values: Tensor) -> None:
        for shard in range(self.manifest.n_shards):
            rows = self.manifest.shard_rows(shard)
            file = ShardWriter(spec.shard_path(self.root, shard), n_chunks=self.manifest.shard_seqs)
            file.append(to_disk(values[rows.start : rows.stop], spec.dtype))
            done = file.commit()
            entry = Entry(shard, spec.name, len(rows), done.n_bytes, done.crc32c, 0.0, 0.0)
            self._commit([entry])


def require_free(root: Path) -> None:
    """Raise StoreError unless a new store may be made here."""
    if root.is_dir():
        if (root / JOURNAL).is_dir() and not is_begun(root) and not is_complete(root):
            return
        if any(root.iterdir()):
            raise StoreError(
                f"{root} is a folder with other things in it; choose an empty one by --store"
            )
    elif root.exists():
        raise StoreError(f"{root} is a file; choose a folder by --store")


class ShardSession:
    """Takes the sequences of one shard; a thread writes them behind the model's back."""

    def __init__(self, root: Path, manifest: Manifest, shard: int) -> None:
        self._shard = shard
        self._n_seq = len(manifest.shard_rows(shard))
        self._first_seq = manifest.shard_rows(shard).start
        self._specs = {
            s.name: s for layer in manifest.layers for s in layer_arrays(manifest, layer)
        }
        self._files = {
            name: ShardWriter(
                spec.shard_path(root, shard), n_chunks=manifest.shard_seqs, codec=spec.codec
            )
            for name, spec in self._specs.items()
        }
        self._sums = {name: [0.0, 0.0] for name in self._specs}
        self._n_appended = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lorsa-writer")
        self._waiting: deque[Future[None]] = deque()

    def append(self, batch: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Take the next sequences.

        Args:
            batch: for every layer x and y, each [n, n_ctx, d_model].

        Raises:
            StoreError: the values are not finite, or the disk did not take an earlier batch.
        """
        first = self._first_seq + self._n_appended
        self._n_appended += len(next(iter(batch.values()))[0])
        rows: dict[str, Array] = {}
        for layer, pair in batch.items():
            rows |= self._encode(layer, pair, first)
        while len(self._waiting) >= MAX_WAITING_BATCHES:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, rows))

    def finish(self) -> list[Entry]:
        """Wait for the disk, commit the files and return their journal entries."""
        self._drain()
        if self._n_appended != self._n_seq:
            raise ValueError(
                f"shard {self._shard} has {self._n_seq} sequences; {self._n_appended} were appended"
            )
        entries = []
        for name, file in self._files.items():
            done = file.commit()
            norm_sum, square_sum = self._sums[name]
            entries.append(
                Entry(
                    self._shard, name, self._n_seq, done.n_bytes, done.crc32c, norm_sum, square_sum
                )
            )
        self._pool.shutdown()
        return entries

    def discard(self) -> None:
        """Drop what was written."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.discard()

    def _drain(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def _encode(self, layer: int, pair: tuple[Tensor, Tensor], first_seq: int) -> dict[str, Array]:
        """Return a layer's arrays as they lie on disk, and add up their norms."""
        rows, token_norms = {}, []
        for name, values in zip((attn_in(layer), attn_out(layer)), pair, strict=True):
            spec = self._specs[name]
            rows[name] = to_disk(values, spec.dtype)
            norm = from_disk(rows[name], spec.dtype).float().norm(dim=-1)  # [n, n_ctx]
            self._require_finite(name, values, norm, first_seq)
            self._sums[name][0] += norm.double().sum().item()
            self._sums[name][1] += norm.double().square().sum().item()
            token_norms.append(norm)
        rows[norms(layer)] = to_disk(torch.stack(token_norms, dim=-1), "float32")  # [n, n_ctx, 2]
        return rows

    def _write(self, rows: dict[str, Array]) -> None:
        """Write in the thread, which moves bytes only; see `loader` for why."""
        for name, values in rows.items():
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
