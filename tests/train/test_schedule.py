"""Learning rate and top_k over a run."""

from pathlib import Path
from typing import Any

import pytest
from lorsa.train.config import TrainConfig
from lorsa.train.schedule import lr_factor, top_k_at


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
