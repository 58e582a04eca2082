"""Tables of results in narrow terminals."""

import re
from typing import Any

import pytest
from lorsa.display.find import find_table
from lorsa.display.screen import Screen
from lorsa.display.words import list_table, numbers, words

FIGURES = ["layer", "FVU", "NMSE", "cosine", "L0", "tokens/s"]


def _shown(table: Any, width: int) -> str:
    screen = Screen()
    screen.width = width
    with screen.capture() as shown:
        screen.print(table)
    return shown.get()


def _table(n_figures: int, run: str = "runs/layer-1") -> Any:
    table = list_table("trained", *numbers(*FIGURES[:n_figures]), words("run"))
    for layer in (1, 12):
        table.add_row(str(layer), *["0.12345"] * (n_figures - 1), run)
    table.caption = "what it is of"
    return table


@pytest.mark.parametrize("width", [30, 45, 60, 80, 200])
@pytest.mark.parametrize("n_figures", [1, 3, 6])
def test_no_figure_and_no_word_is_lost(width: int, n_figures: int) -> None:
    """At 60 columns train showed no run, and eval of several runs each figure as "0…"."""
    told = _shown(_table(n_figures), width)
    assert "…" not in told
    assert told.count("0.12345") == 2 * (n_figures - 1)
    assert told.count("runs/layer-1") == 2
    assert max(map(len, told.splitlines())) <= width
    assert "what it is of" in told


def test_texts_stand_below_where_it_is_narrow() -> None:
    """The evidence of find was 14 columns wide, nine lines a head."""
    head = {"layer": 1, "head": 61, "score": 0.7, "score_on_text": 0.8, "score_on_probes": 0.7}
    head |= {"frequency": 0.01, "evidence": ["a [b] <c> d", "[/x] <y>"]}
    result = {"type": "local", "least": 0.5, "best": 0.7, "measured_on": "both", "heads": [head]}
    narrow = _shown(find_table(result), 60).splitlines()
    assert narrow[1].split("  ")[-1].strip() == "fires"
    assert [line.strip() for line in narrow[3:5]] == ["a [b] <c> d", "[/x] <y>"]
    wide = _shown(find_table(result), 120)
    assert re.search(r"1\.000%\s+a \[b\] <c> d", wide)


def test_pairs_are_not_torn() -> None:
    told = _shown(_table(6), 40)
    assert all(f"{name} 0.12345" in told for name in FIGURES[1:])
