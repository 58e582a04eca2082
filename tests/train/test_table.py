"""Results as CSV."""

import csv
from pathlib import Path
from typing import Any

from lorsa.train.sweep import write_csv


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"top_k": 32, "fvu": 0.2, "run": 'runs/a,"b"', "error": None},
        {"top_k": 64, "fvu": None, "run": "runs/b", "error": "no\nroom", "more": 1},
    ]
    write_csv(rows, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["top_k", "fvu", "run", "error", "more"]
    assert list(found[0].values()) == ["32", "0.2", 'runs/a,"b"', "", ""]
    assert list(found[1].values()) == ["64", "", "runs/b", "no\nroom", "1"]
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.csv"]


def test_no_rows_make_an_empty_table(tmp_path: Path) -> None:
    write_csv([], tmp_path / "sweep.csv")
    assert (tmp_path / "sweep.csv").read_text() == "\n"
