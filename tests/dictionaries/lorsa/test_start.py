"""Initialisation of a Lorsa, from a layer and at random."""

import pytest
import torch
import torch.nn.functional as F
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.lorsa.start import (
    _directions,
    _weighted_copies,
    fit_output,
    init_from_layer,
    init_random,
    require_fit,
)
from lorsa.dictionaries.metrics import FVU
from tiny import FAMILIES, LATENTS, config_like, make_model, read_layer, some_tokens
from torch import Tensor


def _start(
    family: str,
    *,
    n_ov_heads: int = 128,
    top_k: int = 128,
    fit: bool = True,
) -> tuple[Lorsa, Tensor, Tensor]:
    (geometry, weights), x, y = read_layer(make_model(family), 1, some_tokens(16, seed=2))
    config = config_like(
        geometry,
        n_qk_heads=2 * geometry.n_heads,
        n_ov_heads=n_ov_heads,
        top_k=top_k,
        select="abs" if top_k == n_ov_heads else "relu",
    )
    lorsa = Lorsa(config)
    init_from_layer(lorsa, weights, geometry, x, seed=0)
    if fit:
        fit_output(lorsa, x, y)
    return lorsa, x, y


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [
        ([1.0, 1.0, 1.0, 1.0], [3, 3, 3, 3]),
        ([1.0, 1.0, 1.0, 0.0], [4, 4, 3, 1]),
        ([9.0, 1.0, 1.0, 1.0], [9, 1, 1, 1]),
        ([0.0, 0.0, 0.0, 0.0], [3, 3, 3, 3]),
    ],
)
def test_heads_that_write_more_get_more_copies(sizes: list[float], copies: list[int]) -> None:
    signs = torch.tensor([1.0, -1.0] * 8)[:, None, None]
    outputs = signs * torch.ones(16, 4, 3) + 5  # a mean is no variation
    W_O = torch.tensor(sizes)[:, None, None] * torch.ones(4, 3, 6)
    assert _weighted_copies(outputs, W_O, 12).tolist() == copies


@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_copies_attend_as_their_heads(family: str) -> None:
    (geometry, weights), x, y = read_layer(make_model(family), 1, some_tokens(16, seed=2))
    lorsa, _, _ = _start(family)
    equal = lorsa.pattern(x[:2]).detach()
    init_from_layer(lorsa, weights, geometry, x, seed=0, weighted=True)
    fit_output(lorsa, x, y)
    pattern = lorsa.pattern(x[:2]).detach()
    distance = (pattern[:, :, None] - equal[:, None, ::2]).abs().amax(dim=(0, 3, 4))
    assert distance.amin(dim=1).max() < 1e-4  # each is a copy of some head
    assert distance.amin(dim=0).max() < 1e-4  # and each head has one
    assert _fvu(lorsa, x, y) < 0.6


def _fvu(lorsa: Lorsa, x: Tensor, y: Tensor) -> float:
    fvu = FVU()
    with torch.no_grad():
        fvu.update(y, lorsa(x))
    return fvu.value


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_layer_explains_much_before_any_training(family: str) -> None:
    lorsa, x, y = _start(family)
    assert _fvu(lorsa, x, y) < 0.6


EAGER = [family for family in FAMILIES if "alibi" not in family and family not in LATENTS]
"""Families but for Falcon with biases, which transformers' plain attention adds twice, and those
whose queries and keys no Lorsa has."""


@pytest.mark.parametrize("family", EAGER)
def test_from_the_layer_attends_as_the_layer(family: str) -> None:
    """Against the patterns that transformers gives, which none of our code has computed."""
    model = make_model(family, eager=True)
    tokens = some_tokens()
    with torch.no_grad():
        expected = model(tokens, output_attentions=True, use_cache=False).attentions[1]
    lorsa, _, _ = _start(family)
    x = read_layer(make_model(family), 1, tokens)[1]
    with torch.no_grad():
        pattern = lorsa.pattern(x)  # [batch, 2 n_heads, q_pos, k_pos]
    assert expected.shape[1] * 2 == pattern.shape[1]
    assert (pattern - expected.repeat_interleave(2, dim=1)).abs().max() < 1e-4
    assert pattern.std() > 0.01


def test_from_the_layer_is_sparse_and_still_explains() -> None:
    lorsa, x, y = _start("llama-gqa", top_k=12)
    assert _fvu(lorsa, x, y) < 0.8
    random, _, _ = _start("llama-gqa", top_k=12)
    init_random(random, x, seed=0)
    fit_output(random, x, y)
    assert _fvu(lorsa, x, y) < _fvu(random, x, y) < 1


def test_heads_read_what_they_write() -> None:
    """u^T d = 1: a head whose own direction d is attended to once answers 1 more.

    d and u are not kept, so they are read back from W_O and W_V, which here have full rank.
    """
    lorsa, _x, _y = _start("llama-mha", fit=False)
    weights = read_layer(make_model("llama-mha"), 1)[0].weights
    n_heads = len(weights.W_V)
    read = lorsa.W_V.detach().view(n_heads, -1, 32) @ torch.linalg.pinv(weights.W_V.transpose(1, 2))
    write = lorsa.W_O.detach().view(n_heads, -1, 32) @ torch.linalg.pinv(weights.W_O)
    assert torch.allclose((read * write).sum(-1), torch.ones(n_heads, 32), atol=1e-3)


def test_heads_start_centred() -> None:
    lorsa, x, _y = _start("llama-mha")
    with torch.no_grad():
        z = lorsa.z_pre(x).flatten(0, 1)
    assert z.mean(0).abs().max() < 1e-3


def test_directions_are_those_of_the_signal_not_of_the_noise() -> None:
    """Clusters of whitened outputs were blown-up noise where a head has few strong directions."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.eye(24)[:4] + torch.eye(24)[[1, 2, 3, 0]]
    signal = truth[torch.randint(4, (2000,), generator=generator)]
    outputs = signal + 0.15 * torch.randn(2000, 24, generator=generator)
    _mean, _read, write = _directions(outputs, 12, generator)
    centred = F.normalize(truth - outputs.mean(0), dim=1)
    assert (F.normalize(write, dim=1) @ centred.T).amax(dim=0).min() > 0.95


def test_a_direction_is_read_by_its_matched_filter() -> None:
    """u is parallel to Sigma^-1 d, u d = 1, and what it reads varies by 1."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(500, 6, generator=generator) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    mean, u, d = _directions(outputs, 9, generator)
    covariance = outputs.T.cov(correction=0)
    assert torch.allclose(F.normalize(u @ covariance), F.normalize(d), atol=1e-4)
    assert torch.allclose((u * d).sum(1), torch.ones(9), atol=1e-4)
    read = (outputs - mean) @ u.T
    assert torch.allclose(read.std(dim=0, correction=0), torch.ones(9), atol=1e-4)


def test_shapes_that_cannot_start_from_the_layer_are_named() -> None:
    geometry = read_layer(make_model("llama-mha"), 0)[0].geometry
    settings = {"d_model": 32, "n_ov_heads": 48, "top_k": 4, "scale": 1.0}
    with pytest.raises(ValueError, match="n_qk_heads is 6; init 'layer' needs a multiple"):
        require_fit(LorsaConfig(**settings, n_qk_heads=6, d_qk_head=8), geometry)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="d_qk_head is 4; init 'layer' needs the layer's 8"):
        require_fit(LorsaConfig(**settings, n_qk_heads=4, d_qk_head=4), geometry)  # type: ignore[arg-type]
