"""The files of a checkpoint, written whole or not at all, and checks of what is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..reading import parse_json
from ..whole import whole, write_json
from .choices import CONFIG
from .config import DictionaryConfig

SHOWN_CHARACTERS = 80
MOST_NAMED = 12
"""Tensors, or settings, that a message names at most."""

Shape = tuple[int, ...]


class Saved(NamedTuple):
    """A dictionary as plain data: what a checkpoint holds."""

    kind: str
    """Kind of dictionary, as "lorsa" """
    config: DictionaryConfig
    """Shape and origin of the dictionary"""
    tensors: Mapping[str, Tensor]
    """Parameters, and the threshold if there is one, by name; for raw activations"""


def write_folder(
    folder: Path,
    weights: str,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors and config.json into a folder.

    The weights come first and config.json last, each by a temporary file, a flush to the disk and a
    rename, so a folder with a config.json is whole.

    Args:
        folder: created if need be.
        weights: name of the safetensors file.
        tensors: by name.
        content: what config.json holds.
        metadata: entries in the safetensors file's header.

    Raises:
        CheckpointError: the disk does not take it.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        with whole(folder / weights) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # safetensors would make the file private to its owner
            save_file(plain, partial, metadata=dict(metadata))
            _sort_metadata(partial)
            partial.chmod(mode)
        write_json(folder / CONFIG, content)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written ({error}); make room") from None


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: it has another each time, to no purpose."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def check_shapes(path: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise CheckpointError, naming them, if tensors are missing, unknown or of another shape."""
    wrong = [
        f"{name} is {list(found[name]) if name in found else 'missing'}, expected {list(shape)}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    wrong += [f"{shown_name(name)} is unknown" for name in found if name not in expected]
    if wrong:
        more = f"; and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        raise CheckpointError(
            f"{path} does not fit its {CONFIG}: {'; '.join(wrong[:MOST_NAMED])}{more}"
        )


def require_floats(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a weight's dtype is not floating, or has 8 bits."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() > 1:
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        scaled = "multiply by its scale and " if tensor.is_floating_point() else ""
        raise CheckpointError(
            f"{path}: {name} is of {dtype}, which is no dtype of weights; {scaled}save it as "
            "float32"
        )


def shown(value: Any) -> str:
    """Return a value from a file of unknown origin, shortened for one line of a message."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def shown_name(name: str) -> str:
    """Return a name from a file of unknown origin for one line of a message; quoted if odd."""
    is_plain = name.isprintable() and len(name) <= SHOWN_CHARACTERS
    return name if is_plain else shown(name)


def listing(folder: Path) -> str:
    """Return the names of a folder's first files, for a message."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
