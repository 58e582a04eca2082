"""Results of a push."""

from typing import Any

from rich.markup import escape

from ..printable import printable
from ..store.care.info import format_bytes
from ..store.layers import spell_layers


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
    others = [layer for layer in result["layers"] if layer not in result["pushed"]]
    if others:
        told.append(f"beside layers {spell_layers(others)}, which were there")
    return escape("\n".join(map(printable, told)))
