"""Figures of tokens that count, and of all, beside each other."""

import io
from typing import Any

import pytest
from lorsa.display.evaluate import eval_tables
from lorsa.display.sweep import sweep_table
from lorsa.display.train import train_table
from rich.console import Console, RenderableType

RUN = {"layer": 1, "l0": 4.0, "dead_fraction": 0.0, "train_tokens": 9, "tokens_per_second": 1.0}
RUN |= {"seconds": 1.0, "dead_window_tokens": 9, "run": "runs/1.resid_out", "kind": "sae"}
MEASURED: dict[str, Any] = {
    "run": "runs/1.resid_out",
    "kind": "sae",
    "layer": 1,
    "reads": ["1.resid_out"],
    "writes": ["1.resid_out"],
    "nmse": 0.3,
    "cosine": 0.9,
    "l0": 4.0,
    "dead_fraction": 0.0,
    "cross_entropy": None,
}


def _text(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("masked", [0.0, 0.004])
def test_training_shows_the_fvu_of_all_tokens_where_some_are_masked(masked: float) -> None:
    run = RUN | {"fvu": 0.1614, "fvu_all": 0.0031, "masked_fraction": masked}
    text = _text(train_table({"runs": [run], "failed": [RUN | {"error": "no room"}]}))
    assert "0.1614" in text
    assert ("0.0031" in text, "with masked" in text) == (masked > 0, masked > 0)


@pytest.mark.parametrize("fvu_all", [0.1614, 0.0031])
def test_a_sweep_does_as_well(fvu_all: float) -> None:
    row = RUN | {"top_k": 4, "fvu": 0.1614, "fvu_all": fvu_all, "error": None}
    row = {"top_k": 4, "fvu": 0.1614} | row
    text = _text(sweep_table({"rows": [row], "out": "sweep", "bytes_read": 1}))
    assert ("0.0031" in text, "with masked" in text) == (fvu_all != 0.1614,) * 2


@pytest.mark.parametrize("outliers", [0.0, 0.004])
def test_eval_shows_the_fvu_without_outliers_where_there_are_some(outliers: float) -> None:
    fvus = {"fvu": 0.0031, "fvu_usual": 0.1614}
    run = MEASURED | fvus | {"outlier_fraction": outliers}
    run["random"] = {"fvu": 0.5, "fvu_usual": 0.75}
    text = _text(eval_tables({"runs": [run], "together": None}))
    assert ("0.1614" in text, "0.7500" in text, "FVU*" in text) == (outliers > 0,) * 3
    nothing: dict[str, Any] = {"fvu": [], "nmse": [], "cosine": [], "l0": [], "variance": []}
    run |= {"by_position": nothing, "n_tokens": 9}
    run["frequency_histogram"] = {"log10_from": [-1], "n_features": [4], "n_silent": 0}
    text = _text(eval_tables(run))
    assert ("0.1614" in text, "0.7500 without" in text) == (outliers > 0,) * 2
