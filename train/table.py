"""The results of several runs as a file that any spreadsheet opens."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows under the names of all their columns, in the order in which these first come.

    Args:
        rows: a run each; what a row lacks or has as None is left empty.
        path: written whole or not at all.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)
