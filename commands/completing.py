"""What a shell offers at Tab: runs, stores, layers, kinds, sites, and types of heads.

Only JSON and names of folders are read. Where there is nothing of the kind, a shell offers files.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from ..analyze.choices import KINDS as TYPES
from ..analyze.type_names import spelled
from ..reading import read_json
from ..sites import SITE_NAMES
from ..train.recipe import ALL, KINDS

RUN_FILES = ("run.json", "config.json", "analysis/analysis.json")
STORE_FILES = ("manifest.json", "journal/plan.json")
MOST = 100
"""Names that are offered at most."""


def types(incomplete: str) -> list[str]:
    """Return types of heads that begin so."""
    begun = spelled(incomplete)
    return [name for name in map(spelled, TYPES) if name.startswith(begun)]


def runs(incomplete: str) -> list[str]:
    """Return folders of runs that begin so: here, or one folder below."""
    return _folders(incomplete, RUN_FILES)


def stores(incomplete: str) -> list[str]:
    """Return folders of stores that begin so: here, or one folder below."""
    return _folders(incomplete, STORE_FILES)


def layers(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return choices of layers that begin so, of the store that was typed, else of ./acts."""
    store = ctx.params.get("store")
    places = [store] if store else [*ctx.args, "acts"]  # an argument before it is not parsed yet
    have = next((found for name in places if (found := _layers(Path(name)))), [])
    return _one_more(incomplete, have)


def kinds(incomplete: str) -> list[str]:
    """Return kinds of dictionaries that begin so, after those that were typed."""
    return _one_more(incomplete, (*KINDS, ALL))


def sites(incomplete: str) -> list[str]:
    """Return sites that begin so, after those that were typed."""
    return _one_more(incomplete, SITE_NAMES)


COMPLETED: dict[str, Callable[..., list[str]]] = {
    "run": runs,
    "runs": runs,
    "store": stores,
    "kind": kinds,
    "site": sites,
}
"""Completions of the values of settings, by their names."""


def _one_more(typed: str, words: Iterable[str]) -> list[str]:
    """Return texts that add one of some words to those that were typed, joined by commas."""
    before, comma, last = typed.rpartition(",")
    taken = set(before.split(","))
    return [f"{before}{comma}{n}" for n in words if n.startswith(last) and n not in taken]


def _folders(begun: str, files: tuple[str, ...]) -> list[str]:
    if any(letter in begun for letter in "*?[\0") or begun.startswith("~"):
        return []
    return sorted(set(_found(begun, files)))[:MOST]


def _found(begun: str, files: tuple[str, ...]) -> Iterator[str]:
    root = "/" if begun.startswith("/") else "."
    for between in ("", "*/"):
        for name in files:
            for path in Path(root).glob(f"{begun.lstrip('/')}*/{between}{name}"):
                yield str(path)[: -len(name) - 1]


def _layers(store: Path) -> list[str]:
    for name in STORE_FILES:
        try:
            facts: Any = read_json(store / name, constant=float)
            if "layers" in facts:  # format 1
                return sorted(map(str, facts["layers"]), key=int)
            return sorted({site.partition(".")[0] for site in facts["sites"]}, key=int)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []
