"""Comparison of a store's Zarr metadata with its manifest."""

import json
from typing import Any

from ..errors import StoreError
from .arrays import DISK_DTYPES, all_arrays
from .manifest import Manifest
from .places import Place, read_json

METADATA = "zarr.json"
_MATTERS = (
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "dimension_names",
)
"""Fields that decide whether an array is found and read correctly."""


def difference(path: Place, expected: bytes) -> str | None:
    """Return how a zarr.json differs from what is expected, None if it does not."""
    try:
        found, wanted = read_json(path), json.loads(expected)
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
    except ValueError:
        return "is damaged"
    if not isinstance(found, dict):
        return "is damaged"
    for field in _MATTERS:
        if found.get(field) != wanted.get(field):
            return f"has another {field} than the manifest: {_short(found.get(field))}"
    attributes = found.get("attributes")
    if not isinstance(attributes, dict) or not wanted["attributes"].items() <= attributes.items():
        return f"has other attributes than the manifest: {_short(attributes)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:76] + " ..."


def require_shapes(root: Place, manifest: Manifest) -> None:
    """Raise StoreError unless every array has the shape and data type of the manifest."""
    for name, spec in all_arrays(manifest).items():
        path = root / name / METADATA
        try:
            found = read_json(path)
            facts = found["shape"], found["data_type"]
        except (OSError, ValueError, KeyError, TypeError):
            facts = None
        expected = [manifest.n_seq, *spec.row_shape], DISK_DTYPES[spec.dtype]
        if facts != expected:
            has = "cannot be read" if facts is None else f"says {facts[0]} {facts[1]}"
            raise StoreError(
                f"{path} {has}; the manifest says {expected[0]} {expected[1]}: "
                f"see lorsa store verify {root}"
            )
