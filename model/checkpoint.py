"""A Lorsa on disk: config.json and lorsa.safetensors, usable on raw activations as they are.

    config.json        {"format": "lorsa", "schema_version": 1, "config": {...LorsaConfig}}
    lorsa.safetensors  the parameters by name, and the threshold of activations that have one

Weights are written first and config.json last, each by a temporary file, a flush to the disk and a
rename, so a folder with a config.json is whole.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import LorsaConfig, tensor_shapes
from .lorsa import Lorsa

SCHEMA_VERSION = 1
WEIGHTS = "lorsa.safetensors"
CONFIG = "config.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message names the path and the next step."""


def save(lorsa: Lorsa, folder: str | Path) -> None:
    """Write the Lorsa's config and weights into a folder, which is made if need be.

    Raises:
        CheckpointError: the disk does not take it.
    """
    folder = Path(folder)
    try:
        _write(lorsa, folder)
    except (OSError, SafetensorError) as error:
        (folder / f"{WEIGHTS}.partial").unlink(missing_ok=True)
        raise CheckpointError(f"{folder} cannot be written ({error}); make room") from None


def _write(lorsa: Lorsa, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().cpu().contiguous() for n, t in lorsa.state_dict().items()}
    (folder / CONFIG).unlink(missing_ok=True)
    partial = folder / f"{WEIGHTS}.partial"
    partial.touch()
    mode = partial.stat().st_mode  # safetensors would make the file private to its owner
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(mode)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, folder / WEIGHTS)
    content = {
        "format": "lorsa",
        "schema_version": SCHEMA_VERSION,
        "config": lorsa.config.to_dict(),
    }
    write_json(folder / CONFIG, content)


def load(folder: str | Path, *, backend: str = "auto") -> Lorsa:
    """Read a Lorsa from a folder; see `Lorsa.from_pretrained`."""
    folder = Path(folder)
    config = load_config(folder)
    lorsa = Lorsa(config, backend=backend)
    expected = tensor_shapes(config)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(path, found, expected)
            lorsa.load_state_dict({name: file.get_tensor(name) for name in expected})
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder has {_listing(folder)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or train it again") from None
    return lorsa.eval()


def load_config(folder: str | Path) -> LorsaConfig:
    """Read the config of a saved Lorsa alone.

    Raises:
        CheckpointError: as `load`.
    """
    path = Path(folder) / CONFIG
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no Lorsa ({CONFIG} is missing; there is {_listing(path.parent)}); "
            f"give {_advice(path.parent)}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != "lorsa":
        raise CheckpointError(f"{path} is not a Lorsa's config; its format is not 'lorsa'")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {content.get('schema_version')}; this version of lorsa "
            f"reads {SCHEMA_VERSION}: install the version that wrote it"
        )
    try:
        return LorsaConfig.from_dict(content["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a Lorsa: {error}") from None


def _advice(folder: Path) -> str:
    """Return what to give in place of a folder without a Lorsa."""
    inner = sorted(path.parent for path in folder.glob(f"*/*/{CONFIG}"))
    inner = [path for path in inner if path.suffix != ".partial"]
    return str(inner[-1]) if inner else "the folder of a finished run, such as runs/layer-12"


def write_json(path: Path, content: Any) -> None:
    """Write JSON by a temporary file, flushed to the disk, and a rename."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _check_shapes(
    path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    wrong = [
        f"{name} is {list(found[name]) if name in found else 'missing'}, expected {list(shape)}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    if wrong:
        raise CheckpointError(f"{path} does not fit its {CONFIG}: {'; '.join(wrong)}")


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
