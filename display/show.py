"""Results on stdout, by command."""

from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape

from .circuits import ablate_tables
from .evaluate import eval_tables
from .features import analyze_table, explain_table, find_table, view_table
from .harvest import harvest_table, plan_table
from .share import convert_table, demo_table, push_lines
from .store import info_table, merge_table, rm_table, verify_lines
from .train import sweep_table, train_table


def show(command: str, result: dict[str, Any]) -> None:
    """Print a command's result on stdout."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 200  # a file has no edge
    content = _TABLES[command](result)
    out.print(content, soft_wrap=isinstance(content, str))
    if result.get("next"):  # to be copied, so in one line
        out.print(f"next: {escape(result['next'])}", soft_wrap=True)


_TABLES: dict[str, Callable[[dict[str, Any]], RenderableType]] = {
    "harvest": harvest_table,
    "plan": plan_table,
    "train": train_table,
    "sweep": sweep_table,
    "eval": eval_tables,
    "ablate": ablate_tables,
    "analyze": analyze_table,
    "find": find_table,
    "explain": explain_table,
    "view": view_table,
    "convert": convert_table,
    "info": info_table,
    "verify": verify_lines,
    "rm": rm_table,
    "merge": merge_table,
    "push": push_lines,
    "demo": demo_table,
}
