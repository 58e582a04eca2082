"""Origin of a run: the store and the language model that its files name, where they are now.

A store is known by its uuid: a folder of the same name with another store in it is not taken. A
language model is taken only where it is on this machine, so nothing is fetched unasked; commands
compare its revision and the layer's weights, as they do with a model that was given.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..dictionaries.choices import CONFIG
from ..errors import TrainError
from ..language.aliases import at_hand
from ..seal import read_summed
from ..store.folder import is_complete
from ..store.manifest import MANIFEST, read_manifest
from ..store.places import place

RUN = "run.json"
"""File of a run's settings, facts and result."""
UP = 4
"""Folders above a run in which a relative name is looked for."""


def store_of(run: Path) -> str:
    """Return the store that a run was trained on, as it can be typed here.

    Args:
        run: a run's folder, or any folder with a saved Lorsa.

    Raises:
        TrainError: the run names no store, it is not where the run says, or a file of the run is
            damaged.
        StoreError: the store is damaged, or its bucket cannot be reached.
    """
    facts = read_facts(run / RUN)
    name = _text(facts, "config", "store")
    uuid = _text(facts, "decisive", "store_uuid") or _text(facts_of(run), "store_uuid")
    if name is None:
        raise TrainError(f"{run} does not name its store; give --store")
    others = {}
    for candidate in _candidates(name, run):
        root = place(candidate)
        if not is_complete(root):
            continue
        found = read_manifest(root / MANIFEST).uuid
        if uuid in (None, found):
            return candidate
        others[candidate] = found
    for candidate, found in others.items():
        raise TrainError(
            f"{candidate} is another store than the one that {run} is of (uuid {found}, not "
            f"{uuid}); give --store"
        )
    raise TrainError(f"the store of {run}, {name}, is not there; give --store")


def model_of(run: Path) -> str | None:
    """Return the language model that a run is of, as its files name it; None if they do not."""
    return _text(facts_of(run), "base_model")


def model_at_hand(run: Path) -> str | None:
    """Return the language model that a run is of as it can be typed here.

    Returns:
        None if the run's files name none, or if it is not on this machine.
    """
    name, revision = model_of(run), _text(facts_of(run), "base_revision")
    if name is None:
        return None
    found = (at_hand(candidate, revision) for candidate in _candidates(name, run))
    return next((each for each in found if each is not None), None)


def facts_of(run: Path) -> dict[str, Any]:
    """Return what a Lorsa's config.json says of its shape and origin; nothing without one."""
    facts = read_facts(run / CONFIG).get("config")
    return facts if isinstance(facts, dict) else {}


def _candidates(name: str, run: Path) -> Iterator[str]:
    """Yield the places that a name may mean: from here, and from the folders that a run lies in."""
    yield name
    if "://" in name or os.path.isabs(name):
        return
    for folder in list(run.resolve().parents)[:UP]:
        path = str(folder / name)
        yield min(path, os.path.relpath(path), key=len)


def read_facts(path: Path) -> dict[str, Any]:
    """Return the content of a file of facts; nothing of one that is not there.

    Raises:
        TrainError: it cannot be read, or is damaged.
    """
    try:
        content = read_summed(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}); restore it from a copy") from None
    return content if isinstance(content, dict) else {}


def _text(facts: dict[str, Any], *names: str) -> str | None:
    """Return the text at the end of some names, None where there is none."""
    found: Any = facts
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) and found else None
