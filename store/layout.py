"""Zarr v3 metadata of a store, by which any Zarr tool opens it, and its small arrays."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from ..sites import Site
from .arrays import DISK_DTYPES, ArraySpec, all_arrays, site_arrays
from .bucket import BucketPath
from .choices import COMPRESSION_LEVELS
from .manifest import Manifest
from .places import Place
from .schema import METADATA
from .site_facts import weights_at


def create_arrays(
    root: Place | MemoryStore, manifest: Manifest, sites: Iterable[Site] | None = None
) -> None:
    """Write the Zarr metadata of the group and of all sharded arrays, or only those of sites."""
    if isinstance(root, BucketPath):
        with put_later(root) as memory:
            create_arrays(memory, manifest, sites)
        return
    group = zarr.open_group(root, mode="a", zarr_format=3)
    specs = list(all_arrays(manifest).values())
    if sites is not None:
        specs = site_arrays(manifest, sites)
    for spec in specs:
        compressors: list[Any] = [Crc32cCodec()]
        if spec.compression != "none":
            compressors.insert(0, _blosc_metadata(spec))
        group.create_array(
            spec.name,
            shape=(manifest.n_seq, *spec.row_shape),
            chunks=(1, *spec.row_shape),
            shards=(manifest.shard_seqs, *spec.row_shape),
            dtype=DISK_DTYPES[spec.dtype],
            compressors=compressors,
            fill_value=0,
            dimension_names=spec.dims,
            attributes={"lorsa_dtype": spec.dtype},
            overwrite=True,
        )


def metadata(manifest: Manifest) -> dict[str, bytes]:
    """Return the zarr.json that every group and sharded array should have, by its path."""
    files: dict[str, Any] = {}
    create_arrays(MemoryStore(files), manifest)
    contents = {name: buffer.to_bytes() for name, buffer in files.items()}
    group = contents[METADATA]
    for module, facts in manifest.modules.items():
        folder = PurePosixPath(weights_at(module))
        for each in (folder, *folder.parents[:-1]) if facts["weights"] else ():
            contents[f"{each}/{METADATA}"] = group
    return contents


def _blosc_metadata(spec: ArraySpec) -> BloscCodec:
    itemsize = spec.itemsize
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
