"""Results of verifying files."""

from typing import Any

from rich.markup import escape

from ..printable import printable

UNSEALED = "an earlier version made it: only what has checksums could be compared"


def verified_lines(result: dict[str, Any]) -> str:
    """Return a line for each file that is not what was written, and one for each thing."""
    lines = [line for each in result["found"] for line in (*each["problems"], _state(each))]
    return escape("\n".join(map(printable, lines)))


def _state(found: dict[str, Any]) -> str:
    if found["problems"]:
        state = "damaged"
    elif not found["finished"]:
        state = "unfinished; what is there is whole"
    else:
        state = "whole" if found["sealed"] else f"no damage found; {UNSEALED}"
    return f"{found['path']}: {found['kind']}, {state}"
