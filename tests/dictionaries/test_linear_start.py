"""Starts of SAEs and transcoders: sums of known directions are found before any training."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lorsa.dictionaries.linear import LinearDictionary
from lorsa.dictionaries.linear_config import SaeConfig, TranscoderConfig
from lorsa.dictionaries.linear_start import Axes, fit_scale, start_linear
from lorsa.dictionaries.metrics import FVU
from lorsa.dictionaries.sae import Sae
from lorsa.dictionaries.transcoder import Transcoder
from torch import Tensor

D_MODEL, N_TRUE = 16, 24


def _sparse(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return x, sums of a few of 24 directions and a mean, and y, the same of other directions."""
    g = torch.Generator().manual_seed(seed)
    truth = F.normalize(torch.randn(2, N_TRUE, D_MODEL, generator=g), dim=2)
    code = torch.rand(16, 64, N_TRUE, generator=g) * (
        torch.rand(16, 64, N_TRUE, generator=g) < 0.08
    )
    return code @ truth[0] + 2.0, code @ truth[1] - 1.0


def _make(kind: str, n_features: int = 48, **settings: Any) -> LinearDictionary:
    shape: dict[str, Any] = {"d_model": D_MODEL, "n_features": n_features, "top_k": 4, "layer": 0}
    if kind == "sae":
        return Sae(SaeConfig(site="resid_out", **shape | settings))
    return Transcoder(TranscoderConfig(skip=kind == "skip", **shape | settings))


def _start(dictionary: LinearDictionary, x: Tensor, y: Tensor, *, seed: int) -> None:
    start_linear(dictionary, x, y, seed=seed)
    fit_scale(dictionary, x, y)


def _fvu(dictionary: LinearDictionary, x: Tensor, y: Tensor) -> float:
    measured = FVU()
    with torch.no_grad():
        measured.update(y, dictionary(x))
    return measured.value


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_a_start_explains_tokens_that_it_has_not_seen(kind: str) -> None:
    dictionary = _make(kind)
    x, y = _sparse()
    _start(dictionary, x[:12], x[:12] if kind == "sae" else y[:12], seed=0)
    found = _fvu(dictionary, x[12:], x[12:] if kind == "sae" else y[12:])
    assert found < {"sae": 0.35, "transcoder": 0.5, "skip": 0.35}[kind]


def test_features_read_in_deviations_and_above_the_margin() -> None:
    dictionary = _make("transcoder")
    x, y = _sparse()
    _start(dictionary, x, y, seed=0)
    z = (x @ dictionary.W_E.T + dictionary.b_E).flatten(0, 1)
    torch.testing.assert_close(z.std(dim=0, correction=0), torch.ones(48), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.mean(dim=0), -torch.ones(48), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_a_start_knows_no_units(kind: str) -> None:
    """Scaled activations start as well, but for roundings that move a point between clusters."""
    x, y = _sparse()
    one, other = _make(kind), _make(kind)
    y, scale = (x, 8.0) if kind == "sae" else (y, 0.5)
    _start(one, x, y, seed=0)
    _start(other, 8.0 * x, scale * y, seed=0)
    assert abs(_fvu(other.rescale_(1 / 8, 1 / scale), x, y) - _fvu(one, x, y)) < 0.01


def test_a_seed_starts_the_same_way_each_time() -> None:
    x, y = _sparse()
    made = [_make("skip") for _ in range(3)]
    for dictionary, seed in zip(made, (0, 0, 1), strict=True):
        _start(dictionary, x, y, seed=seed)
    assert torch.equal(made[0].W_E, made[1].W_E)
    assert not torch.equal(made[0].W_E, made[2].W_E)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_tokens_of_outlier_norm_lead_nothing(kind: str) -> None:
    """Norms of 1,000 medians, as the first token has in the residual stream of many models."""
    x, y = _sparse()
    y = x if kind == "sae" else y
    with_outliers = x.clone()
    with_outliers[:, 0] *= 1000.0
    plain, other = _make(kind), _make(kind)
    _start(plain, x[:, 1:], y[:, 1:], seed=0)
    _start(other, with_outliers, with_outliers if kind == "sae" else y, seed=0)
    assert torch.equal(other.W_E, plain.W_E)
    assert torch.equal(other.b_O, plain.b_O)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_few_or_constant_tokens_start_something_finite(kind: str) -> None:
    tokens, _y = _sparse()
    for x in (tokens[:1, :3], torch.ones_like(tokens)):
        dictionary = _make(kind)
        _start(dictionary, x, x if kind == "sae" else -x, seed=0)
        assert all(p.isfinite().all() for p in dictionary.parameters())
        assert dictionary(x).isfinite().all()


def test_axes_are_those_in_which_tokens_vary() -> None:
    flat = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 6) + 3.0
    found = Axes.of(flat)
    assert found.axes.shape == (6, 2)
    torch.testing.assert_close(found.mean, flat.mean(dim=0))
    spread = flat.std(dim=0, correction=0)[:2].sort().values
    torch.testing.assert_close(found.deviation.sort().values, spread, atol=0.05, rtol=0)
