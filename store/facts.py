"""Facts of a store: what is in it, without reading it; imports no torch.

    facts = StoreFacts.open("acts")
    facts.layers, facts.manifest.uuid, facts.mean_norms(12)

Opening checks the format version, the arrays' shapes, and that every file of shards.parquet exists
with its size, so that a damaged copy is found before the first step.
"""

from collections.abc import Collection
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ..errors import DamageError, StoreError
from .arrays import all_arrays, scale_of, sites, summed
from .entries import Cells, Entries, Entry
from .folder import is_complete, lost_files, require_agreement, why_not_a_store, written_again
from .layers import spell_layers
from .manifest import MANIFEST, Manifest, read_manifest
from .places import Place, file_size, place
from .schema import require_shapes
from .table import read_table


class LayerNorms(NamedTuple):
    """Mean norms of a layer's activations over the training shards."""

    x: float
    y: float


class TokenScales(NamedTuple):
    """Sizes of the scales of int8 tokens; a token with a huge outlier has a huge scale."""

    mean: float
    largest: float


class StoreFacts:
    """What a store, finished or not, says of its text, layers and files."""

    def __init__(self, root: Place, manifest: Manifest, entries: Entries) -> None:
        """Take what was read of a store; `open` reads it.

        Args:
            root: place of the store.
            manifest: its facts.
            entries: its committed files.
        """
        self.root = root
        self.manifest = manifest
        self._arrays = all_arrays(manifest)
        self._entries = entries.only(self._arrays.__contains__)
        """Committed files, but for those of layers that are being added or removed"""

    @classmethod
    def open(cls, root: str | Place) -> Self:
        """Open a store: its folder, or s3://bucket/folder.

        Args:
            root: place of the store.

        Raises:
            StoreError: no store, an unfinished one, another format version, files missing or cut.
        """
        root = place(root)
        if not is_complete(root):
            raise StoreError(why_not_a_store(root))
        manifest = read_manifest(root / MANIFEST)
        require_agreement(root, manifest)
        require_shapes(root, manifest)
        store = cls(root, manifest, read_table(root, manifest))
        store._check_files()
        return store

    @property
    def layers(self) -> list[int]:
        """Layers in the store, ascending."""
        return sorted(self.manifest.layers)

    @property
    def train_seqs(self) -> npt.NDArray[np.int64]:
        """Sequences to train on, ascending."""
        return self._seqs(held_out=False)

    @property
    def held_out_seqs(self) -> npt.NDArray[np.int64]:
        """Sequences kept for validation, ascending."""
        return self._seqs(held_out=True)

    @property
    def entries(self) -> Collection[Entry]:
        """Committed files, ordered by shard and array."""
        return self._entries.values()

    @property
    def total_bytes(self) -> int:
        """Bytes of all committed files."""
        return self._entries.n_bytes

    def n_bytes(self, layer: int) -> int:
        """Return the bytes of a layer's arrays on disk."""
        return self._total(layer, "n_bytes")

    def n_nonfinite(self, layer: int) -> int:
        """Return the number of tokens of a layer's x or y with NaN or Inf."""
        return self._total(layer, "n_nonfinite")

    def mean_norms(self, layer: int) -> LayerNorms:
        """Return the mean of ||x|| and of ||y|| over the tokens of the training shards."""
        self.require_layer(layer)
        held_out = self.manifest.held_out_shards

        def mean(name: str) -> float:
            shards, rows = self._entries.of(name)
            return self._mean(rows[~np.isin(shards, held_out)])

        return LayerNorms(*map(mean, summed(self.manifest, layer)))

    def scales(self, layer: int) -> dict[str, TokenScales]:
        """Return the sizes of int8's token scales, by array; empty for other dtypes."""
        self.require_layer(layer)
        if self.manifest.dtype != "int8":
            return {}
        found = {}
        for site in sites(self.manifest, layer):
            _, rows = self._entries.of(scale_of(site))
            found[site] = TokenScales(self._mean(rows), float(rows["max_scale"].max(initial=0.0)))
        return found

    def require_layer(self, layer: int) -> None:
        """Raise StoreError unless the layer is stored."""
        if layer not in self.manifest.layers:
            have = spell_layers(self.layers)
            raise StoreError(f"layer {layer} is not in {self.root}; it has layers {have}")

    def _total(self, layer: int, fact: str) -> int:
        arrays = [name for name in self._arrays if name.startswith(f"layers/{layer}/")]
        return sum(int(self._entries.of(name)[1][fact].sum()) for name in arrays)

    def _mean(self, rows: Cells) -> float:
        """Return the mean norm or scale over the tokens of some files of one array."""
        n_tokens = sum(rows["n_seq"].tolist()) * self.manifest.n_ctx
        total = float(sum(rows["norm_sum"].tolist()))  # in order: the same to the last bit
        return total / float(max(n_tokens, 1))

    def _seqs(self, *, held_out: bool) -> npt.NDArray[np.int64]:
        seqs = np.arange(self.manifest.n_seq)
        is_held_out = np.isin(seqs // self.manifest.shard_seqs, self.manifest.held_out_shards)
        chosen: npt.NDArray[np.int64] = seqs[is_held_out == held_out]
        return chosen

    def _check_files(self) -> None:
        """Raise StoreError unless every file is in the table and exists with its size."""
        whole = self._entries.whole(self.manifest.n_shards, self._arrays)
        lost = lost_files(self.root, self._arrays, self._entries)
        bad = {*np.flatnonzero(~whole).tolist()[:1], *(shard for shard, _ in lost)}
        if not bad:
            return
        first = min(bad)
        for name, spec in self._arrays.items():
            path = spec.shard_path(self.root, first)
            if (first, name) not in self._entries:
                raise DamageError(f"{path} is in no row of shards.parquet; harvest again")
            if (first, name) in lost:
                self._refuse(path, file_size(path), self._entries[first, name])

    def _refuse(self, path: Place, size: int | None, entry: Entry) -> None:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.n_bytes:,}"
        remedy = written_again(self.root, self.manifest, entry.array)
        raise DamageError(f"{path} {found}; {remedy}, or restore a copy")
