"""Arrays of a store and their Zarr v3 metadata, by which any Zarr tool opens the folder.

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

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numcodecs
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from .bucket import BucketPath
from .choices import COMPRESSION_LEVELS
from .encoding import DTYPES, blosc
from .manifest import Manifest
from .places import Place

DOCUMENTS = "documents.parquet"


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
    def row_bytes(self) -> int:
        """Bytes of one sequence before compression."""
        size = DTYPES[self.dtype].itemsize
        for length in self.row_shape:
            size *= length
        return size

    @property
    def codec(self) -> "numcodecs.Blosc | None":
        """Codec of a chunk's bytes; None if they are not compressed."""
        return blosc(self.compression, DTYPES[self.dtype].itemsize)

    def shard_name(self, shard: int) -> str:
        """Return the path in the store of one shard's file, by Zarr's default chunk keys."""
        return f"{self.name}/c/{shard}{'/0' * len(self.row_shape)}"

    def shard_path(self, root: Place, shard: int) -> Place:
        """Return the place of one shard's file."""
        return root / self.shard_name(shard)


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


def create_arrays(
    root: Place | MemoryStore, manifest: Manifest, layers: Iterable[int] | None = None
) -> None:
    """Write the Zarr metadata of the group and of all sharded arrays, or only those of layers."""
    if isinstance(root, BucketPath):
        with put_later(root) as memory:
            create_arrays(memory, manifest, layers)
        return
    group = zarr.open_group(root, mode="a", zarr_format=3)
    specs = list(all_arrays(manifest).values())
    if layers is not None:
        specs = [spec for layer in layers for spec in layer_arrays(manifest, layer)]
    for spec in specs:
        compressors: list[Any] = [Crc32cCodec()]
        if spec.compression != "none":
            compressors.insert(0, _blosc_metadata(spec))
        group.create_array(
            spec.name,
            shape=(manifest.n_seq, *spec.row_shape),
            chunks=(1, *spec.row_shape),
            shards=(manifest.shard_seqs, *spec.row_shape),
            dtype=DTYPES[spec.dtype].disk,
            compressors=compressors,
            fill_value=0,
            dimension_names=spec.dims,
            attributes={"lorsa_dtype": spec.dtype},
            overwrite=True,
        )


def _blosc_metadata(spec: ArraySpec) -> BloscCodec:
    itemsize = DTYPES[spec.dtype].itemsize
    return BloscCodec(
        cname=spec.compression,  # type: ignore[arg-type]
        clevel=COMPRESSION_LEVELS[spec.compression],
        shuffle="bitshuffle" if itemsize > 1 else "noshuffle",
        typesize=itemsize,
    )


@contextmanager
def put_later(root: BucketPath) -> Iterator[MemoryStore]:
    """Collect the files that zarr writes and put each once; zarr alone sends many more requests."""
    files: dict[str, Any] = {}
    yield MemoryStore(files)
    for name, content in files.items():
        (root / name).write_bytes(content.to_bytes())
