"""Checkpoints: a dictionary on disk, saved in our format and loaded from any.

    config.json        {"format": "lorsa", "schema_version": 1, "config": {...LorsaConfig}}; of
                       another kind {"format": "lorsa", "kind": "sae", "schema_version": 2, ...}
    lorsa.safetensors  the parameters by name, and the threshold if there is one; in its header the
                       checksums that bind the two files (checkpoint_sums.py)

The weights are for raw activations. Folders of other tools are loaded as well; config.json tells
whose they are.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..reading import read_json
from ..seal import first_damage
from .checkpoint_files import (
    Saved,
    check_shapes,
    listing,
    require_floats,
    shown,
    write_folder,
)
from .checkpoint_sums import check_sums, has_sums, sums_of
from .choices import CONFIG, WEIGHTS
from .config import DictionaryConfig
from .formats import llamascopium, openmoss
from .linear_config import SaeConfig, TranscoderConfig
from .lorsa.config import LorsaConfig

CONFIGS: dict[str, type[DictionaryConfig]] = {
    config.kind: config for config in (LorsaConfig, SaeConfig, TranscoderConfig)
}
"""Class of the config of each kind."""
VERSIONS = {1: ("lorsa",), 2: ("sae", "transcoder")}
"""Kinds that files of each schema version hold: 1 is of before there were others than Lorsas."""
WEIGHTS_BY_FORMAT = {
    "lorsa": (WEIGHTS,),
    "llamascopium": (llamascopium.WEIGHTS, *llamascopium.OTHER_WEIGHTS),
    "openmoss": (openmoss.WEIGHTS,),
}
"""Names that a folder's weights may have, by its format; the first that is there is read."""


def save(saved: Saved, folder: str | Path) -> None:
    """Write config and weights into a folder, which is created if need be.

    Raises:
        CheckpointError: the disk does not take it.
    """
    version = next(version for version, kinds in VERSIONS.items() if saved.kind in kinds)
    kind = {} if version == 1 else {"kind": saved.kind}
    content = {"format": "lorsa", **kind, "schema_version": version}
    content["config"] = saved.config.to_dict()
    metadata = sums_of(content, saved.tensors)
    write_folder(Path(folder), WEIGHTS, saved.tensors, content, metadata)


def load(folder: str | Path) -> Saved:
    """Read a folder of any format, for raw activations; see `Lorsa.from_pretrained`.

    Raises:
        CheckpointError: no checkpoint, one of another version, or what it holds does not fit.
    """
    folder = Path(folder)
    content = read_config(folder)
    source = format_of(content)
    if source == "lorsa":
        return _load_ours(folder, content)
    if (problem := first_damage(folder)) is not None:  # of what lorsa convert wrote
        raise CheckpointError(f"{problem}; convert it again, or restore it from a copy")
    if source == "llamascopium":
        return llamascopium.read(folder, content)
    return openmoss.read(folder, content)


def is_bound(folder: Path) -> bool:
    """Return whether checksums bind the weights and config.json of a folder in our format.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return has_sums(file.metadata())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None


def weights_path(folder: Path) -> Path:
    """Return the file with the weights of a dictionary of any format.

    Raises:
        CheckpointError: the folder holds no dictionary.
    """
    kind = format_of(read_config(folder))
    paths = [folder / name for name in WEIGHTS_BY_FORMAT[kind or "lorsa"]]
    return next((path for path in paths if path.is_file()), paths[0])


def format_of(content: dict[str, Any]) -> str | None:
    """Return the format of a config.json, a key of `WEIGHTS_BY_FORMAT`; None if it has none."""
    if content.get("format") == "lorsa":
        return "lorsa"
    if llamascopium.is_one(content):
        return "llamascopium"
    return "openmoss" if openmoss.is_one(content) else None


def config_class(folder: Path) -> type[DictionaryConfig]:
    """Return the class of the config of a folder's dictionary, of any format.

    Raises:
        CheckpointError: the folder holds none, or its config cannot be read.
    """
    content = read_config(folder)
    ours = format_of(content) == "lorsa"
    return CONFIGS[_kind_of(folder / CONFIG, content)] if ours else LorsaConfig


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a dictionary of any format.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is none's.
    """
    path = folder / CONFIG
    try:
        content = read_json(path, constant=float)  # other tools may write NaN
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no dictionary ({CONFIG} is missing; there is {listing(path.parent)}); "
            f"give {_advice(path.parent)}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict) or format_of(content) is None:
        raise CheckpointError(
            f"{path} is no dictionary's config: neither its format nor its sae_type is 'lorsa'"
        )
    return content


def _load_ours(folder: Path, content: dict[str, Any]) -> Saved:
    kind = _kind_of(folder / CONFIG, content)
    config = _config_of(folder / CONFIG, kind, content)
    expected = config.tensor_shapes()
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_shapes(path, found, expected)
            tensors = {name: file.get_tensor(name) for name in expected}
            metadata = file.metadata()
    except OSError as error:
        raise CheckpointError(_why_not_read(path, error)) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or train it again") from None
    require_floats(path, tensors)
    check_sums(path, folder / CONFIG, metadata, content, tensors)
    return Saved(kind, config, tensors)


def _why_not_read(path: Path, error: OSError) -> str:
    """Return why weights cannot be read; safetensors calls all that cannot be opened missing."""
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return f"{path} is missing; the folder has {listing(path.parent)}"
    except OSError as other:
        error = other
    return f"{path} cannot be read ({error.strerror or error})"


def _kind_of(path: Path, content: dict[str, Any]) -> str:
    """Return the kind of what a config.json in our format describes."""
    version, kind = content.get("schema_version"), content.get("kind", "lorsa")
    if type(version) is not int or version not in VERSIONS:
        raise CheckpointError(
            f"{path} has schema version {shown(version)}; this version of lorsa reads "
            f"{' and '.join(map(str, VERSIONS))}: install the version that wrote it"
        )
    if kind not in VERSIONS[version]:
        raise CheckpointError(
            f"{path} is of kind {shown(kind)}; of schema version {version} there is "
            f"{' and '.join(VERSIONS[version])}"
        )
    return str(kind)


def _config_of(path: Path, kind: str, content: dict[str, Any]) -> DictionaryConfig:
    try:
        return CONFIGS[kind].from_dict(content["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        title = CONFIGS[kind].title
        raise CheckpointError(f"{path} does not describe {title}: {error}") from None


def _advice(folder: Path) -> str:
    """Return a folder to give in place of one without a dictionary, in words."""
    inner = sorted(path.parent for path in folder.glob(f"*/*/{CONFIG}"))
    inner = [path for path in inner if path.suffix != ".partial"]
    if inner:
        return str(inner[-1])
    run = "the folder of a finished run, such as runs/layer-12"
    may_be_hub_id = len(folder.parts) == 2 and not folder.parent.exists()
    return f"{run}; if it is on the Hub: lorsa convert {folder} FOLDER" if may_be_hub_id else run
