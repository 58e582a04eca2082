"""Learning rate and top_k over a run."""

from pathlib import Path
from typing import Any

import pytest
from lorsa.train.config import TrainConfig
from lorsa.train.extent import Extent
from lorsa.train.schedule import lr_at, lr_factor, steps_in_time, top_k_at


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig(store=Path("s"), layer=0, out=Path("o"), **changes)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (50, 0.5), (100, 1.0), (500, 1.0), (800, 1.0), (900, 0.5), (1000, 0.0)],
)
def test_lr_rises_stays_and_falls(tokens: int, expected: float) -> None:
    config = _config(warmup_frac=0.1, decay_frac=0.2)
    assert lr_factor(config, tokens, 1000) == pytest.approx(expected)


def test_lr_without_warmup_and_decay_is_constant() -> None:
    config = _config(warmup_frac=0.0, decay_frac=0.0)
    assert [lr_factor(config, tokens, 1000) for tokens in (0, 1, 999)] == [1, 1, 1]


def _span(config: TrainConfig) -> Extent:
    """Return the size of a run of 10 steps of 100 tokens."""
    return Extent(2, 100, 1, 0, 0, 0, 0).lasting(10, config)


def test_the_first_step_of_a_warmup_moves_the_weights() -> None:
    config = _config(lr=2.0, warmup_frac=0.1, decay_frac=0.2)
    span = _span(config)
    assert [lr_at(config, span, tokens) for tokens in (0, 500, 900)] == [1, 2, pytest.approx(0.5)]


@pytest.mark.parametrize(("train_tokens", "expected"), [(None, 7), (550, 5), (10, 1)])
def test_steps_fill_the_time_but_not_more_tokens(train_tokens: int | None, expected: int) -> None:
    config = _config(train_tokens=train_tokens)
    assert steps_in_time(config, _span(config), done=3, left_s=2.0, step_s=0.5) == expected


def test_top_k_falls_to_its_value() -> None:
    config = _config(top_k=10, top_k_start=4.0, top_k_anneal_frac=0.5)
    found = [top_k_at(config, tokens, 1000, 100) for tokens in (0, 250, 500, 900)]
    assert found == [40, 25, 10, 10]
    assert top_k_at(config, 0, 1000, 20) == 20
    assert top_k_at(_config(top_k=10), 0, 1000, 100) == 10
    assert top_k_at(_config(top_k=10, top_k_start=3, top_k_anneal_frac=0), 0, 1000, 100) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k is 0; allowed: 1 or more"),
        ({"lr": 0.0}, "lr is 0.0; allowed: above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"warmup_frac": 1.5}, "warmup_frac is 1.5; allowed: 0..1"),
        ({"top_k_start": 0.5}, "top_k_start is 0.5"),
        ({"init": "zeros"}, "init is 'zeros'; allowed: layer, layer-weighted, random"),
        ({"backend": "mps"}, "backend is 'mps'"),
        ({"train_tokens": 0}, "train_tokens is 0"),
        ({"checkpoint_every_tokens": -1}, "checkpoint_every_tokens is -1"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**change)
