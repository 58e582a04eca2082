"""Results on stdout, by command."""

from collections.abc import Callable
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ..printable import printable
from .ablate import ablate_tables
from .analyze import analyze_table
from .convert import convert_table
from .demo import demo_table
from .evaluate import eval_tables
from .explain import explain_table
from .find import find_table
from .harvest import harvest_table, plan_table
from .push import push_lines
from .screen import Screen
from .store import info_table, merge_table, rm_table, verify_lines
from .sweep import sweep_table
from .train import train_table
from .verify import verified_lines
from .view import view_table


def show(command: str, result: dict[str, Any]) -> None:
    """Print a command's result on stdout."""
    out = Screen()
    if not out.is_terminal:
        out.width = 200  # a file has no edge
    content = _TABLES[command](result)
    out.print(content, soft_wrap=isinstance(content, str))
    if result.get("next"):  # to be copied, so in one line
        out.print(Text(f"next: {printable(result['next'])}"), soft_wrap=True)


_TABLES: dict[str, Callable[[dict[str, Any]], RenderableType]] = {
    "harvest": harvest_table,
    "harvest --dry-run": plan_table,
    "train": train_table,
    "sweep": sweep_table,
    "eval": eval_tables,
    "ablate": ablate_tables,
    "analyze": analyze_table,
    "find": find_table,
    "explain": explain_table,
    "view": view_table,
    "convert": convert_table,
    "store info": info_table,
    "store verify": verify_lines,
    "store rm": rm_table,
    "store merge": merge_table,
    "push": push_lines,
    "verify": verified_lines,
    "demo": demo_table,
}
