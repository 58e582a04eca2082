"""Files of a store that never change: weights, int8's channel scales, document names.

An array is one chunk of values and their crc32c, beside a zarr.json. The manifest has a checksum of
each of these files; a chunk's is that of its values, as data and its own crc32c have the same
crc32c whatever the data. Nothing is read before its size is what the metadata says.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from zarr import open_group
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from ..errors import DamageError, StoreError, UnreachableError, reason_of
from ..seal import crc32c, hexadecimal
from ..sites import Site
from .arrays import DISK_DTYPES, DOCUMENTS, itemsize
from .bucket import BucketPath
from .encoding import from_disk, to_disk
from .layout import put_later
from .manifest import Manifest
from .parquet import read_bounded, write_parquet
from .places import Place, file_size, read_json, reading
from .schema import METADATA
from .shard import CRC_BYTES
from .site_facts import channel_of, weights_at

RESTORE = "restore it from a copy, or delete the store and harvest again"
_LITTLE = {"endian": "little"}


class _Facts(NamedTuple):
    """What the zarr.json of an array of one chunk says."""

    shape: tuple[int, ...]
    dtype: str
    """Logical dtype"""
    chunk_name: str
    """Path of its chunk in the store"""
    chunk: Place

    @property
    def n_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * itemsize(self.dtype)


def write_array(root: Place | MemoryStore, name: str, values: Tensor) -> dict[str, str]:
    """Write a small array as one chunk, in its own dtype; return the checksums of its files."""
    if isinstance(root, BucketPath):
        with put_later(root) as memory:
            return write_array(memory, name, values)
    dtype = str(values.dtype).removeprefix("torch.")
    data = to_disk(values, dtype)
    open_group(root, mode="a", zarr_format=3).create_array(
        name,
        data=data,
        chunks=tuple(values.shape),
        compressors=[Crc32cCodec()],
        attributes={"lorsa_dtype": dtype},
        config={"write_empty_chunks": True},
        overwrite=True,
    )
    metadata = f"{name}/{METADATA}"
    if isinstance(root, Path):
        content = (root / metadata).read_bytes()
    else:
        content = root._store_dict[metadata].to_bytes()
    chunk = "/".join([name, "c", *["0"] * values.ndim])
    return {metadata: hexadecimal(crc32c(content)), chunk: hexadecimal(crc32c(data.tobytes()))}


def read_array(root: Place, manifest: Manifest, name: str) -> Tensor:
    """Read a small array.

    Raises:
        UnreachableError: this machine failed.
        StoreError: it is missing or damaged.
    """
    try:
        facts = _facts(root, manifest, name)
        problem = _size_problem(facts)
        if problem is not None:
            raise DamageError(problem)
        with reading(facts.chunk):
            data = facts.chunk.read_bytes()
        values = np.frombuffer(bytearray(data[:-CRC_BYTES]), DISK_DTYPES[facts.dtype])
        crc = crc32c(values) if values.size else 0
        if crc.to_bytes(CRC_BYTES, "little") != data[-CRC_BYTES:]:
            raise DamageError(f"{facts.chunk} is damaged (its checksum)")
        _compare(manifest, facts.chunk_name, crc, facts.chunk)
        return from_disk(values.reshape(facts.shape), facts.dtype)
    except UnreachableError:
        raise
    except (OSError, DamageError) as error:
        raise StoreError(f"{root / name} cannot be read ({reason_of(error)}); {RESTORE}") from None


def array_problem(
    root: Place, manifest: Manifest, name: str, shape: list[int] | None, *, full: bool
) -> tuple[str, str] | None:
    """Return which file of an array of one chunk is not as written, and what is wrong with it.

    Args:
        root: place of the store.
        manifest: its facts.
        name: path of the array in the store.
        shape: expected shape, None if it is not known.
        full: whether to read its values; otherwise the metadata and the chunk's size are compared.
    """
    try:
        facts = _facts(root, manifest, name)
    except FileNotFoundError:
        return f"{name}/{METADATA}", "is missing"
    except UnreachableError:
        raise
    except (OSError, DamageError):
        return f"{name}/{METADATA}", "is damaged"
    if shape not in (None, list(facts.shape)):
        return f"{name}/{METADATA}", f"has the shape {list(facts.shape)} instead of {shape}"
    if (size := file_size(facts.chunk)) is None:
        return facts.chunk_name, "is missing"
    if size != facts.n_bytes + CRC_BYTES:
        due = facts.n_bytes + CRC_BYTES
        return facts.chunk_name, f"has {size:,} bytes instead of {due:,}"
    if full:
        try:
            read_array(root, manifest, name)
        except UnreachableError:
            raise
        except StoreError:
            return facts.chunk_name, "is damaged"
    return None


def _size_problem(facts: _Facts) -> str | None:
    size, due = file_size(facts.chunk), facts.n_bytes + CRC_BYTES
    if size is None:
        return f"{facts.chunk} is missing"
    return None if size == due else f"{facts.chunk} has {size:,} bytes instead of {due:,}"


def _facts(root: Place, manifest: Manifest, name: str) -> _Facts:
    """Read the zarr.json of an array of one chunk, which has one form.

    Raises:
        UnreachableError, OSError: it cannot be read.
        DamageError: it is of another form, or not the one that was written.
    """
    path = root / name / METADATA
    if manifest.is_sealed:
        with reading(path):
            _compare(manifest, f"{name}/{METADATA}", crc32c(path.read_bytes()), path)
    try:
        content = read_json(path)
        shape, dtype = tuple(content["shape"]), content["attributes"]["lorsa_dtype"]
        if not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
            raise ValueError(f"shape {shape}")
        _require_form(content, shape, DISK_DTYPES[dtype])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamageError(f"{path} is not as lorsa writes it ({reason_of(error)})") from None
    chunk = "/".join([name, "c", *["0"] * len(shape)])
    return _Facts(shape, dtype, chunk, root / chunk)


def _require_form(content: Mapping[str, Any], shape: tuple[int, ...], disk: str) -> None:
    """Raise ValueError unless an array is one plain chunk with its crc32c."""
    grid = {"name": "regular", "configuration": {"chunk_shape": list(shape)}}
    keys = {"name": "default", "configuration": {"separator": "/"}}
    for field, due in (
        ("zarr_format", 3),
        ("node_type", "array"),
        ("data_type", disk),
        ("chunk_grid", grid),
        ("chunk_key_encoding", keys),
    ):
        if content[field] != due:
            raise ValueError(f"{field} {str(content[field])[:60]}")
    serial, check = content["codecs"]
    if serial.get("configuration") not in (None, {}, _LITTLE) or serial["name"] != "bytes":
        raise ValueError(f"codec {str(serial)[:60]}")
    if check["name"] != "crc32c":
        raise ValueError(f"codec {str(check)[:60]}")


def _compare(manifest: Manifest, name: str, crc: int, path: Place) -> None:
    """Raise DamageError unless a file has the checksum that the manifest has of it."""
    if manifest.is_sealed and manifest.checksums.get(name) != hexadecimal(crc):
        raise DamageError(f"{path} is not the file that was written (checksum in the manifest)")


def write_weights(root: Place, module: str, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Write a module's parameters, in their own dtype; return the checksums of their files."""
    checksums: dict[str, str] = {}
    for name, weight in weights.items():
        checksums |= write_array(root, f"{weights_at(module)}/{name}", weight)
    return checksums


def read_weights(root: Place, manifest: Manifest, module: str) -> dict[str, Tensor]:
    """Read a module's parameters by name: of 12.attention, say.

    Raises:
        StoreError: one is missing or damaged.
    """
    return {
        name: read_array(root, manifest, f"{weights_at(module)}/{name}")
        for name in manifest.modules[module]["weights"]
    }


def read_channel(root: Place, manifest: Manifest, site: Site) -> Tensor:
    """Read int8's scale of every channel of a site, float32, [width].

    Raises:
        StoreError: it is missing, damaged or of another shape.
    """
    name, width = channel_of(site.path), manifest.sites[site].width
    channel = read_array(root, manifest, name)
    if channel.shape != (width,) or channel.dtype != torch.float32:
        raise StoreError(
            f"{root / name} is {channel.dtype} {list(channel.shape)}, not float32 [{width}]; "
            f"{RESTORE}"
        )
    return channel


def write_documents(root: Place, names: list[str]) -> dict[str, str]:
    """Write documents.parquet: number and name of every document; return its checksum."""
    table = pa.table({"document": pa.array(range(len(names)), pa.int32()), "name": names})
    content = write_parquet(table)
    (root / DOCUMENTS).write_bytes(content)
    return {DOCUMENTS: hexadecimal(crc32c(content))}


def read_documents(root: Place, manifest: Manifest) -> list[str]:
    """Return the name of every document, by its number.

    Raises:
        UnreachableError: this machine failed.
        StoreError: the file is missing, damaged, or another store's.
    """
    path = root / DOCUMENTS
    try:
        with reading(path):
            content = path.read_bytes()
            _compare(manifest, DOCUMENTS, crc32c(content), path)
            table = read_bounded(content, _most_documents(manifest), texts=["name"])
            names = table.column("name").combine_chunks()
            texts = names.dictionary.to_pylist()
            return [texts[i] for i in names.indices.to_pylist()]
    except UnreachableError:
        raise
    except DamageError as error:
        raise StoreError(f"{error}; restore it from a copy") from None
    except (OSError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"{path} cannot be read ({reason_of(error)}); restore it from a copy"
        ) from None


def _most_documents(manifest: Manifest) -> int:
    """Return how many documents a store may name: each has a token, but for those passed over."""
    known = manifest.corpus.get("n_documents")
    return known if isinstance(known, int) else manifest.n_seq * manifest.n_ctx
