"""Folder of an analysis while one is made: locked, with what is collected so far."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..dictionaries.checkpoint_sums import tensors_crc32c
from ..errors import AnalyzeError, unreadable
from ..progress import Report
from ..reading import parse_json, read_json
from ..seal import SUM, crc32c, first_damage
from ..whole import lock_folder, whole
from .collect import Tensors
from .explanations import EXPLANATIONS
from .result import Analysis
from .schema import FACTS_FILE


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create and lock the folder while the block lasts.

    Raises:
        AnalyzeError: it cannot be written, or another process analyses into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock_folder(folder)
    except OSError as error:
        raise AnalyzeError(f"{folder} cannot be written ({error.strerror}); give --out") from None
    if handle is None:
        raise AnalyzeError(
            f"{folder} is being written by another process; wait for it or give --out"
        )
    try:
        if not os.access(folder, os.W_OK):
            raise AnalyzeError(f"{folder} cannot be written; give --out")
        yield
    finally:
        os.close(handle)


def earlier_facts(folder: Path, report: Report) -> dict[str, Any]:
    """Return the facts of the analysis in a folder; none, and a report, if it is damaged.

    Raises:
        AnalyzeError: it is there and cannot be read.
    """
    if not (folder / FACTS_FILE).exists():
        return {}
    try:
        return Analysis.compared(folder).facts
    except AnalyzeError as error:
        report(str(error))
        return {}
    except OSError as error:
        raise AnalyzeError(unreadable(folder, error)) from None


def archive_explanations(folder: Path, request: dict[str, Any]) -> None:
    """Rename the explanations of other weights, whose analysis is about to be replaced."""
    try:
        if first_damage(folder, (FACTS_FILE,)) is not None:
            return
        before = read_json(folder / FACTS_FILE)
        weights = int(before["request"]["weights_crc32"])  # it becomes part of a name
    except (OSError, ValueError, LookupError, TypeError):
        return
    path = folder / EXPLANATIONS
    if weights != request["weights_crc32"] and path.exists():
        path.rename(path.with_name(f"{path.stem}-{weights}{path.suffix}"))


def save_partial(path: Path, tensors: Tensors, done: int, request: dict[str, Any]) -> None:
    """Write what was collected of `done` sequences, whole or not at all.

    Raises:
        AnalyzeError: the disk does not take it.
    """
    about = {"request": json.dumps(request), "done": str(done)}
    about[SUM] = _sum(about, tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            save_file(tensors, partial, metadata=about)
    except (OSError, SafetensorError) as error:
        raise AnalyzeError(f"{path} cannot be written ({error}); make room") from None


def load_partial(path: Path, request: dict[str, Any], report: Report) -> tuple[Tensors, int]:
    """Return what an earlier call of the same request collected, and of how many sequences.

    Nothing of a damaged file is returned; a report says so.

    Raises:
        AnalyzeError: it is there and cannot be read.
    """
    try:
        about, tensors = _compared(path)
        if parse_json(about.get("request", "null")) != request:
            return {}, 0
        return tensors, int(about["done"])
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise AnalyzeError(unreadable(path, error)) from None
    except (SafetensorError, ValueError, KeyError) as error:
        report(f"{path} is damaged ({error}); collecting anew")
        return {}, 0


def partial_problem(path: Path) -> str | None:
    """Return what is wrong with a file of what was collected, in a line; None if nothing is."""
    try:
        _compared(path)
    except OSError as error:
        return unreadable(path, error)
    except (SafetensorError, ValueError) as error:
        return f"{path} is damaged ({error})"
    return None


def _compared(path: Path) -> tuple[dict[str, str], Tensors]:
    """Return what a file of what was collected says, and its tensors; ValueError if damaged."""
    path.open("rb").close()  # safetensors calls all that cannot be opened missing
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if (expected := about.pop(SUM, None)) is not None and expected != _sum(about, tensors):
        raise ValueError("its checksum is wrong")
    return about, tensors


def _sum(about: dict[str, str], tensors: Tensors) -> str:
    """Return the checksum of what was collected, and of what it is."""
    return tensors_crc32c(tensors, crc32c(json.dumps(about, sort_keys=True).encode()))
