"""Reading of any sequences of one array, each by one positioned read, each checked."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...errors import DamageError, StoreError, UnreachableError, reason_of, remedy_of
from ..arrays import DISK_DTYPES, ArraySpec, DiskArray
from ..bucket import BucketPath
from ..encoding import blosc, from_disk
from ..open_files import OpenFiles
from ..places import Place
from ..shard import read_chunk, read_index

Seqs = npt.NDArray[np.int64] | Sequence[int]
N_REQUESTS = 32
_REQUESTS = ThreadPoolExecutor(N_REQUESTS, thread_name_prefix="lorsa-bucket")
"""Threads that read from buckets, for all arrays; they start with the first request."""


class OpenShard:
    """Shard file, open for reading, with its index; closed when nothing refers to it."""

    def __init__(self, path: Place, n_chunks: int) -> None:
        """Open a file; raises OSError if it is missing, DamageError if its index is damaged."""
        self.path = path
        self.index = read_index(path, n_chunks)
        self.handle: int | BucketPath
        if isinstance(path, BucketPath):
            self.handle = path
            return
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        try:
            if isinstance(self.handle, int):
                os.close(self.handle)
        except (AttributeError, OSError):  # it was never opened
            pass


class RowReader:
    """Sharded array, open for reading; it may be used by many threads."""

    def __init__(
        self,
        root: Place,
        spec: ArraySpec,
        *,
        n_seq: int,
        shard_seqs: int,
        files: OpenFiles | None = None,
    ) -> None:
        """Choose an array of a store.

        Args:
            root: folder of the store.
            spec: the array.
            n_seq: sequences in the array.
            shard_seqs: sequences in one of its shards.
            files: open files, shared with other arrays, or None.
        """
        self.spec = spec
        self._root = root
        self._n_seq = n_seq
        self._shard_seqs = shard_seqs
        self._codec = blosc(spec.compression, spec.itemsize)
        self._files = files or OpenFiles()
        self._name = str(root / spec.name)

    def read(self, seqs: Seqs) -> Tensor:
        """Return sequences in the order given, [n, *shape of a sequence], in the logical dtype.

        Raises:
            StoreError: a chunk is missing or damaged.
            IndexError: a sequence number is out of range.
        """
        out: DiskArray = np.empty((len(seqs), *self.spec.row_shape), DISK_DTYPES[self.spec.dtype])
        self.read_into(seqs, out)
        return from_disk(out, self.spec.dtype)

    def read_into(self, seqs: Seqs, out: DiskArray) -> None:
        """Fill an array, [n, *shape of a sequence] as it lies on disk; raises as `read` does."""
        if isinstance(self._root, BucketPath):  # most of the time is waiting for an answer
            list(_REQUESTS.map(self._read_one, seqs, out))
            return
        for i, seq in enumerate(seqs):
            self._read_one(seq, out[i])

    def _read_one(self, seq: int, out: DiskArray) -> None:
        if not 0 <= seq < self._n_seq:
            raise IndexError(f"sequence {seq}; the store has 0..{self._n_seq - 1}")
        shard, row = divmod(int(seq), self._shard_seqs)
        try:
            file = self._files.get((self._name, shard), partial(self._open, shard))
            read_chunk(file.handle, file.path, file.index[row], out, self._codec)
            self._files.count(int(file.index[row][1]))
        except (OSError, MemoryError) as error:
            path, remedy = self.spec.shard_path(self._root, shard), remedy_of(error)
            kind = StoreError if remedy is None else UnreachableError
            raise kind(
                f"{path} cannot be read ({reason_of(error)}); {remedy or self._remedy()}"
            ) from None
        except DamageError as error:
            raise DamageError(f"{error}; {self._remedy()}") from None

    def _open(self, shard: int) -> OpenShard:
        return OpenShard(self.spec.shard_path(self._root, shard), self._shard_seqs)

    def _remedy(self) -> str:
        return (
            f"lorsa store verify {self._root} --full --repair finds all damage and says how to "
            "have it written again"
        )
