"""Read any sequences of one array, each by one positioned read, each checked."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .encoding import DTYPES, Array, from_disk
from .errors import StoreError
from .layout import ArraySpec
from .shard import read_chunk, read_index

Seqs = npt.NDArray[np.int64] | Sequence[int]
CACHED_INDICES = 4096


class RowReader:
    """One sharded array, open for reading; safe to use from many threads."""

    def __init__(self, root: Path, spec: ArraySpec, *, n_seq: int, shard_seqs: int) -> None:
        """Choose an array of a store.

        Args:
            root: folder of the store.
            spec: the array.
            n_seq: sequences in the array.
            shard_seqs: sequences in one of its shards.
        """
        self._root = root
        self._spec = spec
        self._n_seq = n_seq
        self._shard_seqs = shard_seqs
        self._codec = spec.codec
        self._index = lru_cache(CACHED_INDICES)(self._read_index)

    def read(self, seqs: Seqs) -> Tensor:
        """Return sequences in the order given, [n, *shape of a sequence], in the logical dtype.

        Raises:
            StoreError: a chunk is missing or damaged.
            IndexError: a sequence number is out of range.
        """
        spec = self._spec
        out: Array = np.empty((len(seqs), *spec.row_shape), dtype=DTYPES[spec.dtype].disk)
        for i, seq in enumerate(seqs):
            if not 0 <= seq < self._n_seq:
                raise IndexError(f"sequence {seq}; the store has 0..{self._n_seq - 1}")
            shard, row = divmod(int(seq), self._shard_seqs)
            path = spec.shard_path(self._root, shard)
            entry = self._index(shard)[row]
            try:
                with path.open("rb", buffering=0) as file:
                    read_chunk(file.fileno(), path, entry, out[i], self._codec)
            except OSError as error:
                raise StoreError(f"{path} cannot be read ({error.strerror})") from None
        return from_disk(out, spec.dtype)

    def _read_index(self, shard: int) -> Array:
        return read_index(self._spec.shard_path(self._root, shard), self._shard_seqs)
