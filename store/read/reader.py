"""Reading of a finished store: any sequences of any array, each checked.

    store = ActivationStore.open("acts")
    x = store.activations(12, store.train_seqs[:8]).x     # [8, n_ctx, d_model]

Opening checks what facts.py says; each chunk's checksum is compared when it is read. A store may be
read by many threads and many processes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import StoreError
from .. import fixed
from ..arrays import attn_in, norms, scale_of, sites
from ..encoding import Encoded
from ..entries import Entries
from ..facts import StoreFacts
from ..manifest import Manifest
from ..open_files import OpenFiles
from ..places import Place
from .derived import KnownNorms, norm_limit
from .rows import RowReader, Seqs


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
        x, y, norms = self
        return Stored(
            x.to(device, non_blocking=non_blocking),
            None if y is None else y.to(device, non_blocking=non_blocking),
            None if norms is None else norms.to(device, non_blocking=non_blocking),
        )

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


class ActivationStore(StoreFacts):
    """A finished store, open for reading."""

    def __init__(
        self,
        root: Place,
        manifest: Manifest,
        entries: Entries,
        files: OpenFiles | None = None,
    ) -> None:
        """Use `open`."""
        super().__init__(root, manifest, entries)
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
        facts = StoreFacts.open(root)
        return cls(facts.root, facts.manifest, facts._entries, files)

    @property
    def bytes_read(self) -> int:
        """Bytes of chunks that were read so far through the open files of this store."""
        return self._files.bytes_read

    def tokens(self, seqs: Seqs) -> Tensor:
        """Return token ids, int32, [n, n_ctx]."""
        return self.read("tokens", seqs)

    def documents(self, seqs: Seqs) -> Tensor:
        """Return the number of the document that each token comes from, int32, [n, n_ctx]."""
        return self.read("documents", seqs)

    def document_names(self) -> list[str]:
        """Return the name of every document, by the number that `documents` gives."""
        return fixed.read_documents(self.root, self.manifest)

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
        return self._encoded(attn_in(layer), seqs).decode()

    def stored(self, layer: int, seqs: Seqs) -> Stored:
        """Return a layer's x and y of some sequences, encoded as in the store."""
        self.require_layer(layer)
        x, *y = (self._encoded(site, seqs) for site in sites(self.manifest, layer))
        if y:
            return Stored(x, y[0])
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
            self._channels[site] = fixed.read_channel(self.root, self.manifest, site)
        return self._channels[site]

    def _encoded(self, site: str, seqs: Seqs) -> Encoded:
        values, channel = self.read(site, seqs), self.channel(site)
        if channel is None:
            return Encoded(values)
        return Encoded(values, self.read(scale_of(site), seqs), channel)

    def norms(self, layer: int, seqs: Seqs) -> Tensor:
        """Return ||x|| and ||y|| of every token, float32, [n, n_ctx, 2]."""
        self.require_layer(layer)
        return self.read(norms(layer), seqs)

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Return the attention layer's own parameters by name (W_Q, W_K, W_V, W_O, b_Q, ...)."""
        self.require_layer(layer)
        return fixed.read_weights(self.root, self.manifest, layer)

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
