"""Results of a push."""

from typing import Any

from rich.markup import escape

from ..printable import printable
from ..store.care.info import format_bytes
from ..store.layers import spell_layers

LAYER = "layer-"
"""Beginning of the name of a Lorsa's folder."""


def push_lines(result: dict[str, Any]) -> str:
    """Return what was pushed; of a dry run the card and the files, as they would be."""
    files = [f"{format_bytes(size):>10}  {path}" for path, size in result["files"].items()]
    where = result["url"] or result["repo"]
    if not result["sent"]:
        told = ["", f"nothing was sent; {where} would get", *files]
        return escape("\n".join([result["card"], *map(printable, told)]))
    told = [f"{'written' if result['url'] is None else 'pushed'} to {where}", *files]
    if result["commit"] is not None:
        told.append(f"in commit {result['commit']}")
    others = [name for name in result["folders"] if f"{name}/config.json" not in result["files"]]
    layers = [int(name[len(LAYER) :]) for name in others if name.startswith(LAYER)]
    places = [f"layers {spell_layers(layers)}"] if layers else []
    places += [name for name in others if not name.startswith(LAYER)]
    if places:
        told.append(f"beside {', '.join(places)}, which were there")
    return escape("\n".join(map(printable, told)))
