"""Arrays of a store: their names, shapes and dtypes; imports nothing heavy.

    tokens                    [n_seq, n_ctx] int32     token ids, as fed to the model
    documents                 [n_seq, n_ctx] int32     document that each token comes from
    documents.parquet                                  the name of every document
    layers/<l>/<site>         [n_seq, n_ctx, width]    activations of a site, unless derived
    layers/<l>/<site>_norm    [n_seq, n_ctx] float32   norm of every token, of derived sites too
    weights/<l>/<name>                                 parameters of the layer's attention
    weights/<l>/mlp/<name>                             and of its other modules

    layers/<l>/<site>_scale   [n_seq, n_ctx] float32   scale of every token, int8 alone
    layers/<l>/<site>_channel [width] float32          scale of every channel, int8 alone

Format 1 knew attn_in and attn_out alone, and kept the norms of both in one array, layers/<l>/norms
[n_seq, n_ctx, 2]. All arrays but weights and channels are cut alike: a chunk is a sequence, a shard
is `shard_seqs` of them, one file.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..sites import Site
from .manifest import Manifest
from .places import Place
from .site_facts import PAIR, channel_of, scale_of, weights_at

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


class NormsAt(NamedTuple):
    """Array and column that the norms of a site's tokens lie in."""

    array: str
    """Path of the array in the store"""
    column: int | None
    """Column of the pair's array of format 1; None where the array is the site's own"""


def norms_at(manifest: Manifest, site: Site) -> NormsAt:
    """Return where the norms of a site lie."""
    if manifest.sites[site].in_pair:
        return NormsAt(f"layers/{site.layer}/norms", PAIR.index(site.name))
    return NormsAt(f"{site.path}_norm", None)


def summed(manifest: Manifest, site: Site) -> str:
    """Return the array whose entries carry the sums of a site's norms."""
    facts = manifest.sites[site]
    return site.path if facts.in_pair and facts.is_stored else norms_at(manifest, site).array


def is_int8(manifest: Manifest, site: Site) -> bool:
    """Return whether a site is stored as int8, with scales."""
    return manifest.dtype == "int8" and manifest.sites[site].is_stored


def together(manifest: Manifest, site: Site) -> list[Site]:
    """Return the sites that are written with a site: itself, and the one that it has norms with."""
    if not manifest.sites[site].in_pair:
        return [site]
    pair = (Site(site.layer, name) for name in PAIR)
    return [each for each in pair if each in manifest.sites and manifest.sites[each].in_pair]


def whole_arrays(manifest: Manifest) -> Iterator[tuple[str, list[int] | None]]:
    """Yield the arrays that are one chunk, with their shape where the manifest gives it."""
    for module, facts in manifest.modules.items():
        for weight in facts["weights"]:
            yield f"{weights_at(module)}/{weight}", None
    for site, about in manifest.sites.items():
        if is_int8(manifest, site):
            yield channel_of(site.path), [about.width]


def text_arrays(manifest: Manifest) -> list[ArraySpec]:
    """Return the arrays that are written before the model runs."""
    shape, dims = (manifest.n_ctx,), ("seq", "pos")
    return [ArraySpec(name, shape, dims, "int32", "none") for name in ("tokens", "documents")]


def site_arrays(manifest: Manifest, sites: Iterable[Site]) -> list[ArraySpec]:
    """Return the arrays of some sites, each once: a pair of format 1 shares that of its norms."""
    n_ctx, by_token = manifest.n_ctx, ("seq", "pos")
    found: dict[str, ArraySpec] = {}
    for site in sites:
        facts = manifest.sites[site]
        if facts.is_stored:
            shape, dims = (n_ctx, facts.width), (*by_token, "d_model")
            spec = ArraySpec(site.path, shape, dims, manifest.dtype, manifest.compression)
            found[site.path] = spec
        if is_int8(manifest, site):
            name = scale_of(site.path)
            found[name] = ArraySpec(name, (n_ctx,), by_token, "float32", "none")
        name, column = norms_at(manifest, site)
        found.pop(name, None)  # a pair's come after both
        found[name] = ArraySpec(name, (n_ctx,), by_token, "float32", "none")
        if column is not None:
            found[name] = found[name]._replace(row_shape=(n_ctx, 2), dims=(*by_token, "in_out"))
    return list(found.values())


def all_arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return every sharded array of a store by name."""
    specs = text_arrays(manifest) + site_arrays(manifest, manifest.sites)
    return {spec.name: spec for spec in specs}
