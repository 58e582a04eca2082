"""Results on stdout, by command."""

from importlib import import_module
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ..printable import printable
from .screen import Screen


def show(command: str, result: dict[str, Any]) -> None:
    """Print a command's result on stdout."""
    out = Screen()
    if not out.is_terminal:
        out.width = 200  # a file has no edge
    module, name = _TABLES[command]
    content: RenderableType = getattr(import_module(f".{module}", __package__), name)(result)
    out.print(content, soft_wrap=isinstance(content, str))
    if result.get("next"):  # to be copied, so in one line
        out.print(Text(f"next: {printable(result['next'])}"), soft_wrap=True)


_TABLES = {
    "harvest": ("harvest", "harvest_table"),
    "harvest --dry-run": ("harvest", "plan_table"),
    "train": ("train", "train_table"),
    "sweep": ("sweep", "sweep_table"),
    "eval": ("evaluate", "eval_tables"),
    "ablate": ("ablate", "ablate_tables"),
    "trace": ("trace", "trace_tables"),
    "analyze": ("analyze", "analyze_table"),
    "find": ("find", "find_table"),
    "explain": ("explain", "explain_table"),
    "view": ("view", "view_table"),
    "convert": ("convert", "convert_table"),
    "store info": ("store", "info_table"),
    "store verify": ("store", "verify_lines"),
    "store rm": ("store", "rm_table"),
    "store merge": ("store", "merge_table"),
    "push": ("push", "push_lines"),
    "demo": ("demo", "demo_table"),
    "verify": ("verify", "verified_lines"),
}
"""Module here, and its function, by command; that of the command alone is loaded."""
