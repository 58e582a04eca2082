"""Configs made from options and TOML files, one or a grid of them."""

import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from ..errors import UsageError

Config = TypeVar("Config")

OPTIONS_ONLY = {
    "model": "--model",
    "store": "--store",
    "layer": "--layers",
    "out": "--out",
}
"""Settings that a TOML file may not have, and the options in their place."""
RUNS = "run"
"""Name of the tables of a sweep's TOML file that are a run each."""


class Grid(NamedTuple):
    """What a sweep is asked for."""

    base: dict[str, Any]
    """Settings that all runs share"""
    changes: list[dict[str, Any]]
    """Those in which each run differs"""


def make_config(
    kind: type[Config],
    given: dict[str, Any],
    file: Path | None = None,
    *,
    otherwise: dict[str, Any] | None = None,
) -> Config:
    """Build a config from a TOML file and the options given, which win.

    Args:
        kind: of config.
        given: options.
        file: of more settings.
        otherwise: what neither of them says, in place of the defaults.

    Raises:
        UsageError: the file cannot be read, a key is unknown, or a value is out of range.
    """
    settings = (otherwise or {}) | settings_of(kind, file) | given
    with refused(file):
        return kind(**settings)


@contextmanager
def refused(file: Path | None) -> Iterator[None]:
    """Make a UsageError of a block's refusal of settings, some of which may be a file's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        where = "" if file is None else f" (options and {file})"
        raise UsageError(f"{error}{where}") from error


def settings_of(kind: type[Any], file: Path | None) -> dict[str, Any]:
    """Return the settings of a config that a TOML file has.

    Raises:
        UsageError: the file cannot be read, a key is unknown, or a value is of another type.
    """
    known = _known(kind)
    return {
        name: _typed(str(file), name, value, _field(str(file), name, known).type)
        for name, value in _read_toml(file).items()
    }


def make_grid(
    kind: type[Any], options: Mapping[str, str], sets: Iterable[str], file: Path | None
) -> Grid:
    """Build a sweep: options with several values, and a TOML file with lists or [[run]] tables.

    Every [[run]] is combined with every combination of the values; what a [[run]] says wins, then
    options, then the rest of the file.

    Args:
        kind: of config.
        options: values by the name of the setting, joined by commas.
        sets: NAME=VALUES of other settings.
        file: of more of them.

    Raises:
        UsageError: a name is unknown, a value is of another kind, or the file cannot be read.
    """
    known = _known(kind)
    content = _read_toml(file)
    runs = content.pop(RUNS, [{}])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs) or not runs:
        raise UsageError(f"{file}: a run is written under [[{RUNS}]]")
    values = {}
    for name, value in content.items():
        many = isinstance(value, list)
        if many and _is_list(_field(str(file), name, known)):
            many = bool(value) and isinstance(value[0], list)  # a list of lists
        values[name] = _all_typed(str(file), name, value if many else [value], known)
    for text in sets:
        name, equals, words = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: write NAME=VALUE or NAME=VALUE,VALUE")
        name = name.strip()
        found = _split(words, _field("--set", name, known))
        values[name] = _all_typed("--set", name, found, known)
    for name, words in options.items():
        option = "--" + name.replace("_", "-")
        found = _split(words, _field(option, name, known, from_options=True))
        values[name] = _all_typed(option, name, found, known, from_options=True)
    single = {name: some[0] for name, some in values.items() if len(some) == 1}
    many_of = {name: some for name, some in values.items() if len(some) > 1}
    changes = []
    for run in runs:
        typed = {name: _all_typed(str(file), name, [run[name]], known)[0] for name in run}
        free = {name: some for name, some in many_of.items() if name not in typed}
        for chosen in itertools.product(*free.values()):
            changes.append({**dict(zip(free, chosen, strict=True)), **typed})
    return Grid(single, changes)


def _split(words: str, field: "Field[Any]") -> list[Any]:
    """Return values joined by commas, as TOML reads them, else as words.

    The value of a setting that is a list may stand without brackets: 0.25,1 is one of [0.25, 1].
    """
    try:
        values: list[Any] = tomllib.loads(f"values = [{words}]")["values"]
    except tomllib.TOMLDecodeError:
        values = [word.strip() for word in words.split(",") if word.strip()]
    if values and _is_list(field) and not any(isinstance(value, list) for value in values):
        return [values]
    return values


def _all_typed(
    where: str,
    name: str,
    values: list[Any],
    known: dict[str, "Field[Any]"],
    *,
    from_options: bool = False,
) -> list[Any]:
    """Return the values of a setting as its type has them.

    Raises:
        UsageError: there is none, the name is unknown, or one is of another kind.
    """
    field = _field(where, name, known, from_options=from_options)
    if not values:
        raise UsageError(f"{where}: {name} has no value")
    return list(dict.fromkeys(_typed(where, name, value, field.type) for value in values))


def _known(kind: type[Any]) -> dict[str, "Field[Any]"]:
    return {field.name: field for field in fields(kind)}


def _field(
    where: str, name: str, known: dict[str, "Field[Any]"], *, from_options: bool = False
) -> "Field[Any]":
    """Return a setting that may stand here; UsageError with near names if there is none."""
    if name in OPTIONS_ONLY and not from_options:
        raise UsageError(f"{where}: {name} cannot stand here; use {OPTIONS_ONLY[name]}")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        others = ", ".join(other for other in known if other not in OPTIONS_ONLY)
        hint = f"did you mean {near[0]}?" if near else f"there is {others}"
        raise UsageError(f"{where}: unknown setting {name!r}; {hint}")
    return known[name]


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _is_list(field: "Field[Any]") -> bool:
    return any(get_origin(kind) is tuple for kind in _kinds(field.type))


def _typed(where: str, name: str, value: Any, hint: Any) -> Any:
    """Return a value as a setting's type has it; UsageError if it does not fit."""
    kinds = _kinds(hint)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    if type(value) not in kinds:
        wanted = " or ".join(word for kind, word in _KINDS.items() if kind in kinds)
        raise UsageError(f"{where}: {name} is {value!r}; it must be {wanted or 'a list'}")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _read_toml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"config {file}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"config {file}: {error}") from error
