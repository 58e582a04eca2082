"""The last evaluation of a Lorsa, in a file beside its weights.

eval.json  {"format": "lorsa-eval", "schema_version": 1, "lorsa_version", "weights_sha256", and
           `Fidelity.to_dict` without the run's name and the measures by position or decade}
"""

import hashlib
from pathlib import Path
from typing import Any

from ..dictionaries.checkpoint import weights_path
from ..reading import read_json
from ..version import __version__
from ..whole import finite, write_json

EVAL = "eval.json"
EVAL_VERSION = 1
LEFT_OUT = ("run", "frequency_histogram", "by_position")
"""Measures that are not written."""


def keep_evaluation(folder: Path, measured: dict[str, Any]) -> None:
    """Write eval.json; without new cross-entropies, those of an earlier evaluation stay.

    Args:
        folder: the Lorsa's.
        measured: from `Fidelity.to_dict`.

    Raises:
        OSError: the folder cannot be written.
    """
    kept = kept_evaluation(folder) or {}
    losses = measured["cross_entropy"] or kept.get("cross_entropy")
    if losses is not None:
        losses = {name: value for name, value in losses.items() if name != "by_position"}
    content = {
        "format": "lorsa-eval",
        "schema_version": EVAL_VERSION,
        "lorsa_version": __version__,
        "weights_sha256": weights_sha256(folder),
        **{name: value for name, value in measured.items() if name not in LEFT_OUT},
        "cross_entropy": losses,
    }
    write_json(folder / EVAL, content)


def kept_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return the content of eval.json; None if there is none, or it is of other weights."""
    try:
        content = finite(read_json(folder / EVAL, constant=float))
        is_known = content["format"] == "lorsa-eval" and content["schema_version"] == EVAL_VERSION
        if is_known and content["weights_sha256"] == weights_sha256(folder):
            return dict(content)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a convenience: what cannot be read is measured again
    return None


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a Lorsa's weights, in hexadecimal digits."""
    with weights_path(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
