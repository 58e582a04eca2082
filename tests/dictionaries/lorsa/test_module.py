"""The model class: exact where it can be exact."""

from typing import Any

import pytest
import torch
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.kernels.reference import attention_pattern
from lorsa.language.attention import LayerWeights
from lorsa.language.geometry import AttentionGeometry, QKNorm, Rope
from tiny import FAMILIES, NOT_EXACT, config_like, make_model, read_layer


def _lorsa_of(weights: LayerWeights, geometry: AttentionGeometry) -> Lorsa:
    """Build by hand the Lorsa with one OV head per value dimension: the layer itself."""
    g = geometry
    share = g.n_heads // g.n_kv_heads
    n_ov_heads = g.n_heads * g.d_head
    lorsa = Lorsa(config_like(g, n_ov_heads=n_ov_heads, top_k=n_ov_heads, select="abs"))
    values: dict[str, Any] = {
        "W_Q": weights.W_Q,
        "W_K": weights.W_K,
        "W_V": weights.W_V.repeat_interleave(share, 0).transpose(1, 2).reshape(n_ov_heads, -1),
        "W_O": weights.W_O.reshape(n_ov_heads, -1),
        "b_Q": weights.b_Q,
        "b_K": None if weights.b_K is None else weights.b_K.repeat_interleave(share, 0),
        "b_V": None if weights.b_V is None else weights.b_V.repeat_interleave(share, 0).flatten(),
        "b_O": weights.b_O,
        "q_norm": weights.q_norm,
        "k_norm": weights.k_norm,
        "q_norm_bias": weights.q_norm_bias,
        "k_norm_bias": weights.k_norm_bias,
        "sinks": weights.sinks,
    }
    if weights.W_G is not None:
        wide = weights.W_G.expand(-1, -1, g.d_head).transpose(1, 2)
        values["W_G"] = wide.reshape(n_ov_heads, -1)
    if weights.b_G is not None:
        values["b_G"] = weights.b_G.expand(-1, g.d_head).flatten()
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                parameter = getattr(lorsa, name)
                repeats = len(parameter) // len(value)  # of the keys of a norm by head
                parameter.copy_(value.repeat_interleave(repeats, 0))
    return lorsa


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_EXACT])
def test_lorsa_with_all_value_dimensions_is_the_layer(family: str, backend: str) -> None:
    (geometry, weights), x, y = read_layer(make_model(family), 1)
    lorsa = _lorsa_of(weights, geometry)
    lorsa.backend = backend
    with torch.no_grad():
        error = (lorsa(x) - y).norm() / y.norm()
    assert error < 1e-5


def _random(top_k: int = 5, **settings: Any) -> Lorsa:
    config = LorsaConfig(
        **{
            "d_model": 12,
            "n_qk_heads": 2,
            "d_qk_head": 6,
            "n_ov_heads": 16,
            "top_k": top_k,
            "scale": 0.4,
            "rope": Rope(inv_freq=(1.0, 0.1)),
            "qk_norm": QKNorm(eps=1e-6),
            **settings,
        }
    )
    lorsa = Lorsa(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_()
    return lorsa


def test_encode_is_the_top_k_of_z_pre() -> None:
    lorsa, x = _random(select="abs"), torch.randn(2, 9, 12)
    z = lorsa.z_pre(x)
    acts, ids = lorsa.encode(x)
    score = z.abs() * lorsa.W_O.norm(dim=1)
    expected = score.topk(5).indices.sort(-1).values
    assert torch.equal(ids.long(), expected)
    assert torch.allclose(acts, z.gather(-1, expected), atol=1e-5)


def test_encode_takes_another_top_k() -> None:
    acts, ids = _random().encode(torch.randn(1, 4, 12), top_k=9)
    assert acts.shape == ids.shape == (1, 4, 9)


def test_forward_is_decode_of_encode_with_bias() -> None:
    lorsa, x = _random(), torch.randn(2, 9, 12)
    acts, ids = lorsa.encode(x)
    z = torch.zeros(2, 9, 16).scatter(-1, ids.long(), acts)
    assert torch.allclose(lorsa(x), z @ lorsa.W_O + lorsa.b_O, atol=1e-5)


def test_z_pre_is_the_pattern_times_the_values() -> None:
    lorsa, x = _random(), torch.randn(1, 7, 12)
    pattern, v = lorsa.pattern(x), lorsa.values(x)
    expected = torch.stack([pattern[:, i // 8] @ v[..., i, None] for i in range(16)], -1)[:, :, 0]
    assert torch.allclose(lorsa.z_pre(x), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": QKNorm(eps=1e-6, kind="rms_full")}], ids=str)
def test_patterns_of_some_heads_are_those_of_all(settings: dict[str, Any]) -> None:
    lorsa, x = _random(n_qk_heads=4, **settings), torch.randn(2, 7, 12)
    pattern = lorsa.pattern(x)
    assert pattern.shape == (2, 4, 7, 7)
    assert torch.allclose(lorsa.pattern(x, qk_heads=[3, 0, 3]), pattern[:, [3, 0, 3]])
    ids = torch.tensor([15, 0, 4, 7], dtype=torch.int32)  # as `encode` gives them
    for ov_heads in (ids, ids.tolist()):
        assert torch.allclose(lorsa.pattern(x, ov_heads=ov_heads), pattern[:, [3, 0, 1, 1]])


def test_patterns_of_other_heads_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []

    def pattern_of(q: torch.Tensor, k: torch.Tensor, by: Any, **rest: Any) -> torch.Tensor:
        made.append(tuple(attention_pattern(q, k, by, **rest).shape))
        return attention_pattern(q, k, by, **rest)

    monkeypatch.setattr("lorsa.dictionaries.lorsa.module.attention_pattern", pattern_of)
    _random().pattern(torch.randn(1, 7, 12), ov_heads=[9])
    assert made == [(1, 1, 7, 7)]


def test_heads_of_a_pattern_that_are_not_there_are_named() -> None:
    lorsa, x = _random(), torch.randn(1, 7, 12)
    for head in (2, -1):
        with pytest.raises(ValueError, match=rf"qk_heads has {head}; allowed: 0\.\.1"):
            lorsa.pattern(x, qk_heads=[0, head])
    for head in (16, -1):
        with pytest.raises(ValueError, match=rf"ov_heads has {head}; allowed: 0\.\.15"):
            lorsa.pattern(x, ov_heads=[head])
    with pytest.raises(ValueError, match="qk_heads and ov_heads exclude each other"):
        lorsa.pattern(x, qk_heads=[0], ov_heads=[0])


@pytest.mark.parametrize("settings", [{}, {"sinks": True, "gate": "sigmoid"}], ids=str)
def test_rescale_changes_units_and_nothing_else(settings: dict[str, Any]) -> None:
    lorsa, x = _random(**settings), torch.randn(2, 9, 12)
    before = {name: p.detach().clone() for name, p in lorsa.named_parameters()}
    y_hat = lorsa(x).detach()
    scaled = lorsa.rescale_(4.0, 0.5)(4.0 * x)
    assert torch.allclose(scaled, 0.5 * y_hat, rtol=1e-5, atol=1e-5)
    lorsa.rescale_(0.25, 2.0)
    assert all(torch.equal(p, before[name]) for name, p in lorsa.named_parameters())


def test_window_and_softcap_reach_the_kernel() -> None:
    x = torch.randn(1, 20, 12)
    plain, bent = _random(), _random(window=3, softcap=0.5)
    assert not torch.allclose(plain(x), bent(x))
    assert torch.allclose(bent.pattern(x).tril(-3), torch.zeros(1, 2, 20, 20))


def test_half_precision_inputs_are_taken_as_stores_hold_them() -> None:
    lorsa, x = _random(), torch.randn(1, 5, 12).bfloat16()
    assert torch.equal(lorsa(x), lorsa(x.float()))


@pytest.mark.parametrize("shape", [(5, 12), (1, 5, 11)])
def test_an_input_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"it must be \[batch, seq, 12\]"):
        _random()(torch.randn(shape))


def test_print_shows_the_sizes() -> None:
    assert "n_ov_heads=16, n_qk_heads=2, d_qk_head=6, top_k=5" in repr(_random())
