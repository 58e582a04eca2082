"""A Lorsa as it starts comes from known heads."""

from typing import Any

import pytest
import torch
from lorsa.analyze.attention.parents import find_parents, layer_queries_keys, pattern_likeness
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.contributions import patterns_of
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.lorsa.start import init_from_layer
from lorsa.language.attention import layer_attention
from tiny import config_like, make_model, read_layer

GROUP = 3
"""OV heads of a QK head."""


def test_patterns_are_compared_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole patterns of all heads took memory by the square of the sequence."""
    reading, x, _y = read_layer(make_model("gemma2"), 1)
    weights, g = reading.weights, reading.geometry
    shape = {"scale": g.scale, "rope": g.rope, "softcap": g.softcap, "window": g.window}
    d_model, d_head = weights.W_Q.shape[1:]
    lorsa = Lorsa(
        LorsaConfig(d_model=d_model, n_qk_heads=2, d_qk_head=d_head, n_ov_heads=8, top_k=4, **shape)
    )
    generator = torch.Generator().manual_seed(0)
    for weight in (lorsa.W_Q, lorsa.W_K):
        weight.data.normal_(std=0.3, generator=generator)
    whole = pattern_likeness(lorsa, weights, g, [x])
    seen: list[int] = []

    def patterns(*args: Any) -> torch.Tensor:
        found = patterns_of(*args)
        seen.append(found.numel())
        return found

    limit = 4 * g.n_heads * x.shape[1]
    monkeypatch.setattr("lorsa.analyze.attention.parents.BLOCK_ELEMENTS", limit)
    monkeypatch.setattr("lorsa.analyze.attention.parents.patterns_of", patterns)
    assert torch.allclose(pattern_likeness(lorsa, weights, g, [x]), whole, atol=1e-6)
    assert max(seen) <= limit


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "gemma2", "phi-norm"])
def test_the_heads_that_a_lorsa_starts_from_are_its_parents(family: str) -> None:
    reading, x, _y = read_layer(make_model(family), 1)
    weights, geometry = reading.weights, reading.geometry
    n_heads = geometry.n_heads
    lorsa = Lorsa(config_like(geometry, n_ov_heads=GROUP * n_heads, top_k=4))
    init_from_layer(lorsa, weights, geometry, x, seed=0)
    found = find_parents(lorsa, weights, geometry, [x])
    own = torch.arange(GROUP * n_heads) // GROUP
    assert torch.equal(found.heads[:, 0], own)
    for likeness in (found.ov, found.qk, found.pattern):
        assert torch.allclose(likeness[:, 0], torch.ones(len(own)), atol=1e-4)
    assert float(found.ov[:, 1].max()) < 1
    assert float(found.pattern.min()) >= 0
    assert float(found.pattern.max()) < 1.0001


def test_patterns_are_those_that_make_y() -> None:
    reading, x, y = read_layer(make_model("llama-gqa"), 1)
    weights, g = reading.weights, reading.geometry
    q, k = layer_queries_keys(x, weights, g)
    pattern = patterns_of(g, q, k, slice(0, x.shape[1]))
    assert torch.allclose(pattern.sum(dim=-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(layer_attention(x, weights, g), y, atol=1e-4)
    share = g.n_heads // g.n_kv_heads
    v = torch.einsum("bsd,hdr->bhsr", x, weights.W_V).repeat_interleave(share, dim=1)
    by_hand = torch.einsum("bhts,bhsr,hrd->btd", pattern, v, weights.W_O)
    assert torch.allclose(by_hand, y, atol=1e-4)
