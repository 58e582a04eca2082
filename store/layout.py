"""Zarr v3 metadata of a store, by which any Zarr tool opens it, and its small arrays."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from ..errors import StoreError
from .arrays import DISK_DTYPES, DOCUMENTS, ArraySpec, all_arrays, channel_of, layer_arrays
from .bucket import BucketPath
from .choices import COMPRESSION_LEVELS
from .encoding import from_disk, to_disk
from .manifest import Manifest
from .places import Place, zarr_store
from .schema import METADATA

RESTORE = "restore it from a copy, or delete the store and harvest again"


def create_arrays(
    root: Place | MemoryStore, manifest: Manifest, layers: Iterable[int] | None = None
) -> None:
    """Write the Zarr metadata of the group and of all sharded arrays, or only those of layers."""
    if isinstance(root, BucketPath):
        with _put_later(root) as memory:
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
    owners = [f"weights/{layer}" for layer, facts in manifest.layers.items() if facts["weights"]]
    for folder in ("weights", *owners) if owners else ():
        contents[f"{folder}/{METADATA}"] = group
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
def _put_later(root: BucketPath) -> Iterator[MemoryStore]:
    """Collect the files that zarr writes and put each once; zarr alone sends many more requests."""
    files: dict[str, Any] = {}
    yield MemoryStore(files)
    for name, content in files.items():
        (root / name).write_bytes(content.to_bytes())


def write_weights(root: Place, layer: int, weights: dict[str, Tensor]) -> None:
    """Write a layer's own parameters, in their own dtype."""
    for name, weight in weights.items():
        write_array(root, f"weights/{layer}/{name}", weight)


def read_weights(root: Place, manifest: Manifest, layer: int) -> dict[str, Tensor]:
    """Read a layer's own parameters by name.

    Raises:
        StoreError: one is missing or damaged.
    """
    return {
        name: read_whole(root, f"weights/{layer}/{name}")
        for name in manifest.layers[layer]["weights"]
    }


def write_array(root: Place | MemoryStore, name: str, values: Tensor) -> None:
    """Write a small array as one chunk, in its own dtype."""
    if isinstance(root, BucketPath):
        with _put_later(root) as memory:
            write_array(memory, name, values)
        return
    dtype = str(values.dtype).removeprefix("torch.")
    zarr.open_group(root, mode="a", zarr_format=3).create_array(
        name,
        data=to_disk(values, dtype),
        chunks=tuple(values.shape),
        compressors=[Crc32cCodec()],
        attributes={"lorsa_dtype": dtype},
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def read_whole(root: Place, name: str) -> Tensor:
    """Read a small array.

    Raises:
        StoreError: it is missing or damaged.
    """
    try:
        array = zarr.open_array(zarr_store(root / name), mode="r")
        if array.nchunks_initialized < array.nchunks:
            raise ValueError("it has no data")
        values, dtype = np.asarray(array[...]), str(array.attrs["lorsa_dtype"])
        return from_disk(values, dtype)
    except Exception as error:  # zarr raises what it likes on damaged metadata
        raise StoreError(f"{root / name} cannot be read ({error}); {RESTORE}") from None


def read_channel(root: Place, manifest: Manifest, site: str) -> Tensor:
    """Read int8's scale of every channel of an array, float32, [d_model].

    Raises:
        StoreError: it is missing, damaged or of another shape.
    """
    name = channel_of(site)
    channel = read_whole(root, name)
    if channel.shape != (manifest.d_model,) or channel.dtype != torch.float32:
        raise StoreError(
            f"{root / name} is {channel.dtype} {list(channel.shape)}, not float32 "
            f"[{manifest.d_model}]; {RESTORE}"
        )
    return channel


def write_documents(root: Place, names: list[str]) -> None:
    """Write documents.parquet: number and name of every document."""
    table = pa.table({"document": pa.array(range(len(names)), pa.int32()), "name": names})
    content = pa.BufferOutputStream()
    pq.write_table(table, content, write_page_checksum=True)
    (root / DOCUMENTS).write_bytes(content.getvalue().to_pybytes())


def read_documents(root: Place) -> list[str]:
    """Return the name of every document, by its number."""
    try:
        content = pa.BufferReader((root / DOCUMENTS).read_bytes())
        table = pq.read_table(content, page_checksum_verification=True)
        names: list[str] = table.column("name").to_pylist()
    except (OSError, KeyError, ValueError, MemoryError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"{root / DOCUMENTS} cannot be read ({reason}); restore it from a copy"
        ) from None
    return names
