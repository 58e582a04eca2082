"""From options and TOML files to a grid of configs."""

from pathlib import Path
from typing import Any

import pytest
from lorsa.commands.settings import make_grid
from lorsa.errors import UsageError
from lorsa.train.config import TrainConfig


def _grid(tmp_path: Path, text: str = "", *sets: str, **options: str) -> Any:
    file = tmp_path / "sweep.toml"
    file.write_text(text, "utf-8")
    return make_grid(TrainConfig, options, sets, file)


def test_options_with_several_values_are_combined(tmp_path: Path) -> None:
    grid = _grid(tmp_path, top_k="32,64", lr="1e-3,2", seed="7")
    assert grid.base == {"seed": 7}
    assert grid.changes == [
        {"top_k": 32, "lr": 1e-3},
        {"top_k": 32, "lr": 2.0},
        {"top_k": 64, "lr": 1e-3},
        {"top_k": 64, "lr": 2.0},
    ]
    assert all(type(change["lr"]) is float for change in grid.changes)


def test_a_value_given_twice_is_one(tmp_path: Path) -> None:
    assert _grid(tmp_path, lr="1e-3,0.001").base == {"lr": 1e-3}


def test_words_need_no_quotes(tmp_path: Path) -> None:
    assert _grid(tmp_path, init="layer,random").changes == [{"init": "layer"}, {"init": "random"}]


def test_any_setting_can_be_swept(tmp_path: Path) -> None:
    grid = _grid(tmp_path, "", "betas=[0.9, 0.95],[0.9, 0.999]", "grad_clip=2")
    assert grid.base == {"grad_clip": 2.0}
    assert grid.changes == [{"betas": (0.9, 0.95)}, {"betas": (0.9, 0.999)}]


def test_a_file_may_list_values_and_runs(tmp_path: Path) -> None:
    text = """
        warmup_frac = 0.1
        betas = [0.9, 0.99]
        top_k = [16, 32]
        [[run]]
        lr = 1e-3
        [[run]]
        lr = 2e-3
        top_k = 64
    """
    grid = _grid(tmp_path, text)
    assert grid.base == {"warmup_frac": 0.1, "betas": (0.9, 0.99)}
    assert grid.changes == [
        {"top_k": 16, "lr": 1e-3},
        {"top_k": 32, "lr": 1e-3},
        {"lr": 2e-3, "top_k": 64},
    ]


def test_options_win_over_the_file(tmp_path: Path) -> None:
    assert _grid(tmp_path, "top_k = [16, 32]", top_k="8").base == {"top_k": 8}


def test_nothing_to_sweep_is_one_run(tmp_path: Path) -> None:
    assert _grid(tmp_path).changes == [{}]


@pytest.mark.parametrize(
    ("text", "sets", "message"),
    [
        ("top_kk = [1, 2]", [], "unknown setting 'top_kk'; did you mean top_k?"),
        ("[[run]]\nlearning_rate = 1", [], "unknown setting 'learning_rate'; there is"),
        ("store = 'x'", [], "store cannot stand here; use --store"),
        ("top_k = []", [], "top_k has no value"),
        ("run = 3", [], r"a run is written under \[\[run\]\]"),
        ("top_k = ['many']", [], "top_k is 'many'; it must be a whole number"),
        ("", ["top_k"], "--set top_k: write NAME=VALUE"),
        ("", ["top_k="], "--set: top_k has no value"),
        ("", ["toppk=3"], "--set: unknown setting 'toppk'; did you mean top_k?"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, text: str, sets: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _grid(tmp_path, text, *sets)
