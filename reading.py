"""JSON from a disk: bounded in size and depth, without NaN, no name given twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""Bytes of the largest JSON that is read; ours has a few kB, or MB for a thousand layers."""
MOST_DEPTH = 64
"""Lists and objects within each other; ours has at most eight."""


def read_json(
    path: Path, *, constant: Callable[[str], Any] | None = None, most_bytes: int = MOST_BYTES
) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or larger or deeper than ours may be.
    """
    with path.open("rb") as file:
        return parse_json(file.read(most_bytes + 1), constant=constant, most_bytes=most_bytes)


def parse_json(
    content: bytes | str,
    *,
    constant: Callable[[str], Any] | None = None,
    most_bytes: int = MOST_BYTES,
) -> Any:
    """Return what JSON says.

    Args:
        content: text, in UTF-8 where it is bytes.
        constant: called with NaN, Infinity or -Infinity for its value; None refuses them.
        most_bytes: bytes of the largest content that is parsed.

    Raises:
        ValueError: it is no JSON, has a name twice in an object, or is larger or deeper than ours
            may be. The message is a few words about it.
    """
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_constant=constant or _refuse_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > MOST_DEPTH:
        _require_shallow(found)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice[:40]!r} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it has {name}, which is no number")


def _require_shallow(content: Any) -> None:
    """Raise ValueError for data that is nested deeper than MOST_DEPTH; it does not recurse."""
    level = [content]
    for _ in range(MOST_DEPTH):
        nested: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                nested += [value for value in each.values() if isinstance(value, dict | list)]
            elif isinstance(each, list):
                nested += [value for value in each if isinstance(value, dict | list)]
        if not nested:
            return
        level = nested
    raise ValueError("it is nested too deeply")
