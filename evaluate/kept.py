"""The last evaluation of a dictionary, in a file beside its weights, with a checksum.

eval.json  {"format": "lorsa-eval", "schema_version": 2, "lorsa_version", "weights_sha256",
           "config_sha256", "asked", and `Fidelity.to_dict` without the run's name}

Files of schema version 1 are of Lorsas: what has the name `replaced` since is `lorsa` there, and
nothing is of random features. They are read as what they would be now, without these.

`asked` is the request, of the measures on the store and of those in the model. An evaluation that
is asked for again has its answer there.
"""

import hashlib
from pathlib import Path
from typing import Any

from ..dictionaries.choices import CONFIG, WEIGHTS
from ..errors import AnalyzeError, StoreError, unreadable
from ..language.aliases import canonical
from ..seal import read_summed, write_summed
from ..store.manifest import MANIFEST, read_manifest
from ..version import __version__
from ..whole import finite
from .config import EvalConfig
from .shown import is_whole

EVAL = "eval.json"
EVAL_VERSION = 2
OLDER = 1
"""Version before there were other kinds than Lorsas."""
RENAMED = {"lorsa": "replaced", "n_heads": "n_features"}
"""Names of before, and what they are now."""
HEADER = (
    "format", "schema_version", "lorsa_version", "weights_sha256", "config_sha256", "asked",
)  # fmt: skip
"""Facts of the file that are no measures."""
Asked = dict[str, dict[str, Any] | None]
"""Request by the kind of measure: `on_store`, and `in_model`, which is None without a model."""


def asked_of(config: EvalConfig, store_uuid: str) -> Asked:
    """Return what the measures of an evaluation depend on besides the weights.

    A language model is named by a checksum, for its path is of one machine.
    """
    in_model = None
    if config.model is not None:
        name = hashlib.sha256(canonical(config.model).encode()).hexdigest()
        in_model = {"store_uuid": store_uuid, "ce_tokens": config.ce_tokens, "model_sha256": name}
    return {
        "on_store": {"store_uuid": store_uuid, "tokens": config.tokens},
        "in_model": in_model,
    }


def keep_evaluation(folder: Path, measured: dict[str, Any], asked: Asked) -> None:
    """Write eval.json; without new cross-entropies, those of an earlier evaluation stay.

    Args:
        folder: the dictionary's.
        measured: from `Fidelity.to_dict`.
        asked: request that they answer.

    Raises:
        OSError: the folder cannot be written.
        AnalyzeError: an earlier evaluation is damaged.
    """
    losses, in_model = measured["cross_entropy"], asked["in_model"]
    if losses is None and (kept := kept_evaluation(folder)) is not None:
        losses, in_model = kept.get("cross_entropy"), dict(kept.get("asked") or {}).get("in_model")
    content = {
        "format": "lorsa-eval",
        "schema_version": EVAL_VERSION,
        "lorsa_version": __version__,
        "weights_sha256": weights_sha256(folder),
        "config_sha256": _config_sha256(folder),
        "asked": {**asked, "in_model": in_model},
        **{name: value for name, value in measured.items() if name != "run"},
        "cross_entropy": losses,
    }
    write_summed(folder / EVAL, content)


def kept_answer(config: EvalConfig) -> dict[str, Any] | None:
    """Return what `evaluate_run` would, as `Fidelity.to_dict`, if it was asked the same before.

    Returns:
        None unless this version of lorsa measured this dictionary on the same tokens and model.
    """
    folder = config.run
    if not (folder / CONFIG).is_file():
        from ..dictionaries.fetch import local_folder  # here, for it loads what takes seconds

        folder = local_folder(folder)
    kept = kept_evaluation(folder)
    if kept is None or kept["schema_version"] != EVAL_VERSION or "config_sha256" not in kept:
        return None
    if kept["lorsa_version"] != __version__:
        return None
    try:
        asked = asked_of(config, read_manifest(config.store / MANIFEST).uuid)
    except (StoreError, OSError):
        return None  # whoever measures says what is wrong with it
    before = kept.get("asked", {})
    if not isinstance(before, dict) or not is_whole(kept):
        return None  # measured anew, it is written anew
    if before.get("on_store") != asked["on_store"]:
        return None
    if config.model is None:
        kept["cross_entropy"] = None
    elif before.get("in_model") != asked["in_model"]:
        return None
    measured = {name: value for name, value in kept.items() if name not in HEADER}
    return {"run": str(config.run), **measured}


def kept_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return the content of eval.json; None if there is none, or it is of another dictionary.

    Its weights and its config.json count, of which earlier versions do not say what it was.

    Raises:
        AnalyzeError: it is damaged, or cannot be read.
    """
    content = read_evaluation(folder)
    if content is None or content["weights_sha256"] != weights_sha256(folder):
        return None
    config = _config_sha256(folder)
    return content if content.get("config_sha256", config) == config else None


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return the content of eval.json, of whatever weights; None if there is none.

    Raises:
        AnalyzeError: it is damaged, or cannot be read.
    """
    path = folder / EVAL
    try:
        content = finite(read_summed(path, constant=lambda name: None))
        known = content["format"] == "lorsa-eval" and content["weights_sha256"]
        if known and content["schema_version"] == OLDER:
            return _as_now(content)
        return dict(content) if known and content["schema_version"] == EVAL_VERSION else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AnalyzeError(unreadable(path, error)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise AnalyzeError(
            f"{path} is damaged ({error}); restore it from a copy, or delete it and evaluate again"
        ) from None


def _as_now(content: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation of schema version 1 under the names of today."""
    asked = content.get("asked", {}) | {"in_model": None}  # today that asks for more
    return {**_renamed(content), "kind": "lorsa", "asked": asked}


def _renamed(figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures, and those within them, under the names of today."""
    return {
        RENAMED.get(name, name): _renamed(value) if isinstance(value, dict) else value
        for name, value in figures.items()
    }


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a dictionary's weights, in hexadecimal digits."""
    path = folder / WEIGHTS
    if not path.is_file():
        from ..dictionaries.checkpoint import weights_path  # of another tool; it loads torch

        path = weights_path(folder)
    return _sha256(path)


def _config_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of a dictionary's config.json; None where another tool has none."""
    path = folder / CONFIG
    return _sha256(path) if path.is_file() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
