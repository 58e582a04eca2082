"""Progress and results of making a page."""

from typing import Any

from rich.table import Table

from ..store.care.info import format_bytes
from .bars import Bar
from .words import fact_table


class PageDisplay(Bar):
    """Shows how far a page is written."""

    def __call__(self, done: int, total: int) -> None:
        """Show the number of heads written."""
        self.update(done, total, "heads")


def view_table(result: dict[str, Any]) -> Table:
    """Return where a page is and how large."""
    rows = {
        "page": result["file"],
        "heads": f"{result['n_heads']:,}",
        "size": f"{format_bytes(result['n_bytes'])} in {result['n_files']:,} files",
    }
    if not result["is_new"]:
        rows["made"] = "before: it is up to date with the analysis"
    if result["url"]:
        rows["at"] = f"{result['url']}  (Ctrl-C ends it)"
    if result["opened"] is False:
        rows["browser"] = "none found here; open the page by hand"
    return fact_table("a page of heads", rows)
