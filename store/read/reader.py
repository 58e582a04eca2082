"""Reading of a finished store: any sequences of any array, each checked.

    store = ActivationStore.open("acts")
    x = store.activations(12, store.train_seqs[:8]).x     # [8, n_ctx, d_model]

Opening checks the format version, the arrays' shapes, and that every file of shards.parquet exists
with its size, so that a damaged copy is found before the first step. Each chunk's checksum is
compared when it is read. A store may be read by many threads and many processes.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import StoreError
from .. import layout
from ..encoding import Encoded
from ..entries import Cells, Entries, Entry, read_table
from ..folder import is_complete, lost_files, why_not_a_store, written_again
from ..layers import spell_layers
from ..layout import all_arrays
from ..manifest import MANIFEST, Manifest, read_manifest
from ..places import Place, file_size, place
from ..schema import require_shapes
from .derived import KnownNorms, norm_limit
from .rows import OpenFiles, RowReader, Seqs


class Activations(NamedTuple):
    """Input and output of a layer on some sequences."""

    x: Tensor
    """[n, n_ctx, d_model]"""
    y: Tensor
    """[n, n_ctx, d_model]"""


Derive = Callable[[Tensor], Tensor]
"""Function from a layer's x to its y; `lorsa.language.stored.stored_attention` makes one."""


class Stored(NamedTuple):
    """Input and output of a layer on some sequences, encoded as in the store."""

    x: Encoded
    y: Encoded | None
    """None where y is derived"""
    norms: KnownNorms | None = None
    """Norms of y as the language model gave it; None where y is stored"""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Stored":
        """Return a copy on a device."""
        parts = (
            None if part is None else part.to(device, non_blocking=non_blocking) for part in self
        )
        return Stored(*parts)

    def on(self, device: torch.device | str, derive: Derive | None = None) -> Activations:
        """Return x and y on a device, float32; y is derived there if it is not stored.

        Args:
            device: device of the result.
            derive: function from x to y; needed if y is not stored.

        Raises:
            StoreError: y that is derived has other norms than the language model's.
        """
        stored = self.to(device)
        x = stored.x.decode().float()
        if stored.y is not None:
            return Activations(x, stored.y.decode().float())
        if derive is None:
            raise ValueError("y is not stored, and nothing was given to derive it")
        y = derive(x)
        if stored.norms is not None:
            stored.norms.require(y)
        return Activations(x, y)


class LayerNorms(NamedTuple):
    """Mean norms of a layer's activations over the training shards."""

    x: float
    y: float


class TokenScales(NamedTuple):
    """Sizes of the scales of int8 tokens; a token with a huge outlier has a huge scale."""

    mean: float
    largest: float


class ActivationStore:
    """A finished store, open for reading."""

    def __init__(
        self,
        root: Place,
        manifest: Manifest,
        entries: Entries,
        files: OpenFiles | None = None,
    ) -> None:
        """Use `open`."""
        self.root = root
        self.manifest = manifest
        self._arrays = all_arrays(manifest)
        self._entries = entries.only(self._arrays.__contains__)
        """Committed files, but for those of layers that are being added or removed"""
        n_seq, shard_seqs = manifest.n_seq, manifest.shard_seqs
        self._files = files = files or OpenFiles()
        self._readers = {
            name: RowReader(root, spec, n_seq=n_seq, shard_seqs=shard_seqs, files=files)
            for name, spec in self._arrays.items()
        }
        self._channels: dict[str, Tensor] = {}

    @classmethod
    def open(cls, root: str | Place, files: OpenFiles | None = None) -> "ActivationStore":
        """Open a store: its folder, or s3://bucket/folder.

        Args:
            root: place of the store.
            files: open files, shared with other open stores, or None.

        Raises:
            StoreError: no store, an unfinished one, another format version, files missing or cut.
        """
        root = place(root)
        if not is_complete(root):
            raise StoreError(why_not_a_store(root))
        manifest = read_manifest(root / MANIFEST)
        require_shapes(root, manifest)
        store = cls(root, manifest, read_table(root), files)
        store._check_files()
        return store

    @property
    def layers(self) -> list[int]:
        """Layers in the store, ascending."""
        return sorted(self.manifest.layers)

    @property
    def bytes_read(self) -> int:
        """Bytes of chunks that were read so far through the open files of this store."""
        return self._files.bytes_read

    @property
    def train_seqs(self) -> npt.NDArray[np.int64]:
        """Sequences to train on, ascending."""
        return self._seqs(held_out=False)

    @property
    def held_out_seqs(self) -> npt.NDArray[np.int64]:
        """Sequences kept for validation, ascending."""
        return self._seqs(held_out=True)

    def tokens(self, seqs: Seqs) -> Tensor:
        """Return token ids, int32, [n, n_ctx]."""
        return self.read("tokens", seqs)

    def documents(self, seqs: Seqs) -> Tensor:
        """Return the number of the document that each token comes from, int32, [n, n_ctx]."""
        return self.read("documents", seqs)

    def document_names(self) -> list[str]:
        """Return the name of every document, by the number that `documents` gives."""
        return layout.read_documents(self.root)

    def activations(self, layer: int, seqs: Seqs, derive: Derive | None = None) -> Activations:
        """Return a layer's x and y of some sequences, in the store's dtype; float32 for int8.

        Args:
            layer, seqs: layer and sequences to read.
            derive: function from x to y, on the CPU in float32; needed if y is not stored.

        Raises:
            StoreError: the layer is not stored, a file is damaged, or y can only be derived, or
                comes out with other norms than the language model's.
        """
        stored = self.stored(layer, seqs)
        if stored.y is not None:
            return Activations(stored.x.decode(), stored.y.decode())
        if derive is None:
            raise StoreError(
                f"{self.root} has no y (outputs: derive); give activations(layer, seqs, derive) "
                "what lorsa.language.stored.stored_attention makes of the layer, or take x by "
                "inputs()"
            )
        return stored.on("cpu", derive)

    def inputs(self, layer: int, seqs: Seqs) -> Tensor:
        """Return a layer's x, in the store's dtype; float32 for int8, [n, n_ctx, d_model]."""
        self.require_layer(layer)
        return self._encoded(layout.attn_in(layer), seqs).decode()

    def stored(self, layer: int, seqs: Seqs) -> Stored:
        """Return a layer's x and y of some sequences, encoded as in the store."""
        self.require_layer(layer)
        x, *y = (self._encoded(site, seqs) for site in layout.sites(self.manifest, layer))
        if y:
            return Stored(x, *y)
        return Stored(x, None, self.known_norms(layer, self.norms(layer, seqs)))

    def known_norms(self, layer: int, norms: Tensor) -> KnownNorms:
        """Return norms [n, n_ctx, 2] of a layer as what its derived outputs are checked with."""
        limit = norm_limit(self.manifest, layer)
        return KnownNorms(norms[..., 1], limit, f"{self.root}, layer {layer}")

    def reader(self, name: str) -> RowReader:
        """Return the reader of an array, by its path in the store."""
        return self._readers[name]

    def channel(self, site: str) -> Tensor | None:
        """Return the scale of every channel of int8 activations, None for other dtypes.

        Raises:
            StoreError: it is missing or damaged.
        """
        if self.manifest.dtype != "int8":
            return None
        if site not in self._channels:
            self._channels[site] = layout.read_channel(self.root, self.manifest, site)
        return self._channels[site]

    def scales(self, layer: int) -> dict[str, TokenScales]:
        """Return the sizes of int8's token scales, by array; empty for other dtypes."""
        self.require_layer(layer)
        if self.manifest.dtype != "int8":
            return {}
        found = {}
        for site in layout.sites(self.manifest, layer):
            _, rows = self._entries.of(layout.scale_of(site))
            found[site] = TokenScales(self._mean(rows), float(rows["max_scale"].max(initial=0.0)))
        return found

    def n_nonfinite(self, layer: int) -> int:
        """Return the number of tokens of a layer's x or y with NaN or Inf."""
        return self._total(layer, "n_nonfinite")

    def _encoded(self, site: str, seqs: Seqs) -> Encoded:
        values, channel = self.read(site, seqs), self.channel(site)
        if channel is None:
            return Encoded(values)
        return Encoded(values, self.read(layout.scale_of(site), seqs), channel)

    def norms(self, layer: int, seqs: Seqs) -> Tensor:
        """Return ||x|| and ||y|| of every token, float32, [n, n_ctx, 2]."""
        self.require_layer(layer)
        return self.read(layout.norms(layer), seqs)

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Return the attention layer's own parameters by name (W_Q, W_K, W_V, W_O, b_Q, ...)."""
        self.require_layer(layer)
        return layout.read_weights(self.root, self.manifest, layer)

    def mean_norms(self, layer: int) -> LayerNorms:
        """Return the mean of ||x|| and of ||y|| over the tokens of the training shards."""
        self.require_layer(layer)
        held_out = self.manifest.held_out_shards

        def mean(name: str) -> float:
            shards, rows = self._entries.of(name)
            return self._mean(rows[~np.isin(shards, held_out)])

        return LayerNorms(*map(mean, layout.summed(self.manifest, layer)))

    def require_layer(self, layer: int) -> None:
        """Raise StoreError unless the layer is stored."""
        if layer not in self.manifest.layers:
            have = spell_layers(self.layers)
            raise StoreError(f"layer {layer} is not in {self.root}; it has layers {have}")

    def read(self, name: str, seqs: Seqs) -> Tensor:
        """Read sequences of an array by its path in the store.

        Args:
            name: such as "tokens" or "layers/12/attn_in".
            seqs: sequence numbers in any order, 0..n_seq - 1.

        Returns:
            [n, *shape of a sequence], in the logical dtype.

        Raises:
            StoreError: a chunk is missing or damaged.
            IndexError: a sequence number is out of range.
        """
        return self._readers[name].read(seqs)

    def n_bytes(self, layer: int) -> int:
        """Return the bytes of a layer's arrays on disk."""
        return self._total(layer, "n_bytes")

    @property
    def entries(self) -> Collection[Entry]:
        """Committed files, ordered by shard and array."""
        return self._entries.values()

    @property
    def total_bytes(self) -> int:
        """Bytes of all committed files."""
        return self._entries.n_bytes

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
                raise StoreError(f"{path} is in no row of shards.parquet; harvest again")
            if (first, name) in lost:
                self._refuse(path, file_size(path), self._entries[first, name])

    def _refuse(self, path: Place, size: int | None, entry: Entry) -> None:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.n_bytes:,}"
        remedy = written_again(self.root, self.manifest, entry.array)
        raise StoreError(f"{path} {found}; {remedy}, or restore a copy")
