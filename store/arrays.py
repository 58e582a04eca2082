"""Arrays of a store: their names, shapes and dtypes; imports nothing heavy.

    tokens               [n_seq, n_ctx] int32         token ids, as fed to the model
    documents            [n_seq, n_ctx] int32         document that each token comes from
    documents.parquet                                 the name of every document
    layers/<l>/attn_in   [n_seq, n_ctx, d_model]      x, after the pre-attention norm
    layers/<l>/attn_out  [n_seq, n_ctx, d_model]      y, after the output projection, unless derived
    layers/<l>/norms     [n_seq, n_ctx, 2] float32    ||x||, ||y|| of every token
    weights/<l>/<name>                                the layer's own parameters

    layers/<l>/attn_in_scale    [n_seq, n_ctx] float32    scale of every token, int8 alone
    layers/<l>/attn_in_channel  [d_model] float32         scale of every channel, int8 alone

and the same two for attn_out. All arrays but weights and channels are cut alike: a chunk is a
sequence, a shard is `shard_seqs` of them, one file.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .manifest import Manifest
from .places import Place

DOCUMENTS = "documents.parquet"
DISK_DTYPES = {
    "bfloat16": "uint16",
    "float16": "float16",
    "float32": "float32",
    "int8": "int8",
    "int32": "int32",
}
"""Logical dtypes, and the data type by which numpy and Zarr keep each; the first has bits alone."""
DiskArray = npt.NDArray[Any]
"""Array of values as they lie on disk"""


class ArraySpec(NamedTuple):
    """One sharded array of a store."""

    name: str
    """Path of the array in the store"""
    row_shape: tuple[int, ...]
    """Shape of one sequence"""
    dims: tuple[str, ...]
    """Names of the axes"""
    dtype: str
    """Logical dtype"""
    compression: str

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return itemsize(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sequence before compression."""
        size = self.itemsize
        for length in self.row_shape:
            size *= length
        return size

    def shard_name(self, shard: int) -> str:
        """Return the path in the store of one shard's file, by Zarr's default chunk keys."""
        return f"{self.name}/c/{shard}{'/0' * len(self.row_shape)}"

    def shard_path(self, root: Place, shard: int) -> Place:
        """Return the place of one shard's file."""
        return root / self.shard_name(shard)


def itemsize(dtype: str) -> int:
    """Return the bytes of one value of a logical dtype."""
    return np.dtype(DISK_DTYPES[dtype]).itemsize


def attn_in(layer: int) -> str:
    """Return the name of a layer's x."""
    return f"layers/{layer}/attn_in"


def attn_out(layer: int) -> str:
    """Return the name of a layer's y."""
    return f"layers/{layer}/attn_out"


def scale_of(site: str) -> str:
    """Return the name of the token scales of an int8 array, given that array's name."""
    return f"{site}_scale"


def channel_of(site: str) -> str:
    """Return the name of the channel scales of an int8 array, given that array's name."""
    return f"{site}_channel"


def sites(manifest: Manifest, layer: int) -> list[str]:
    """Return the names of a layer's activations: x, and y unless it is derived."""
    return [attn_in(layer), *([attn_out(layer)] if manifest.outputs == "store" else [])]


def norms(layer: int) -> str:
    """Return the name of a layer's token norms."""
    return f"layers/{layer}/norms"


def summed(manifest: Manifest, layer: int) -> tuple[str, str]:
    """Return the arrays whose entries carry the sums of ||x|| and of ||y||."""
    return attn_in(layer), attn_out(layer) if manifest.outputs == "store" else norms(layer)


def whole_arrays(manifest: Manifest) -> Iterator[tuple[str, list[int] | None]]:
    """Yield the arrays that are one chunk, with their shape where the manifest gives it."""
    for layer, facts in manifest.layers.items():
        for weight in facts["weights"]:
            yield f"weights/{layer}/{weight}", None
        for site in sites(manifest, layer) if manifest.dtype == "int8" else ():
            yield channel_of(site), [manifest.d_model]


def text_arrays(manifest: Manifest) -> list[ArraySpec]:
    """Return the arrays that are written before the model runs."""
    shape, dims = (manifest.n_ctx,), ("seq", "pos")
    return [ArraySpec(name, shape, dims, "int32", "none") for name in ("tokens", "documents")]


def layer_arrays(manifest: Manifest, layer: int) -> list[ArraySpec]:
    """Return the arrays of one layer."""
    n_ctx, d_model = manifest.n_ctx, manifest.d_model
    arrays = []
    for site in sites(manifest, layer):
        dims = ("seq", "pos", "d_model")
        arrays.append(ArraySpec(site, (n_ctx, d_model), dims, manifest.dtype, manifest.compression))
        if manifest.dtype == "int8":
            arrays.append(ArraySpec(scale_of(site), (n_ctx,), ("seq", "pos"), "float32", "none"))
    dims = ("seq", "pos", "in_out")
    return [*arrays, ArraySpec(norms(layer), (n_ctx, 2), dims, "float32", "none")]


def all_arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return every sharded array of a store by name."""
    specs = text_arrays(manifest)
    for layer in manifest.layers:
        specs += layer_arrays(manifest, layer)
    return {spec.name: spec for spec in specs}
