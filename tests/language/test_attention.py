"""The layer as a plain function, against torch's own attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lorsa.kernels.reference import attention_pattern
from lorsa.language.attention import LayerWeights, head_outputs, layer_attention, queries_keys
from lorsa.language.geometry import AttentionGeometry
from lorsa.language.stored import stored_attention


def _weights() -> LayerWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return LayerWeights(
        W_Q=draw(4, 12, 5),
        W_K=draw(2, 12, 5),
        W_V=draw(2, 12, 5),
        W_O=draw(4, 5, 12),
        b_V=draw(2, 5),
        b_O=draw(12),
    )


GEOMETRY = AttentionGeometry(d_model=12, n_heads=4, n_kv_heads=2, d_head=5, scale=0.3)


def test_layer_attention_is_scaled_dot_product_attention() -> None:
    w, x = _weights(), torch.randn(3, 17, 12)
    assert w.b_V is not None
    assert w.b_O is not None
    q = torch.einsum("btd,hdk->bhtk", x, w.W_Q)
    k = torch.einsum("btd,hdk->bhtk", x, w.W_K)
    v = torch.einsum("btd,hdk->bhtk", x, w.W_V) + w.b_V[:, None]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    expected = torch.einsum("bhtk,hkd->btd", out, w.W_O) + w.b_O
    assert torch.allclose(layer_attention(x, w, GEOMETRY), expected, atol=1e-4)
    assert torch.allclose(head_outputs(x, w, GEOMETRY), out.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4, 17, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_heads_attend_by_the_definition(window: int | None, softcap: float | None) -> None:
    """The quick way and the slow one, with every mask, against `attention_pattern`."""
    w, x = _weights(), torch.randn(2, 17, 12, generator=torch.Generator().manual_seed(1))
    geometry = replace(GEOMETRY, window=window, softcap=softcap)
    q, k = queries_keys(x, w, geometry)
    v = torch.einsum("btd,hdk->bthk", x, w.W_V) + w.b_V
    k, v = (part.repeat_interleave(2, dim=2) for part in (k, v))
    pattern = attention_pattern(q, k, geometry)
    expected = torch.einsum("bhts,bshk->bthk", pattern, v)
    assert torch.allclose(head_outputs(x, w, geometry), expected, atol=1e-5)


def test_a_stored_layer_is_the_layer() -> None:
    x = torch.randn(3, 17, 12)
    attend = stored_attention(_weights().present(), GEOMETRY.to_dict(), "cpu")
    assert torch.equal(attend(x), layer_attention(x, _weights(), GEOMETRY))


def test_weights_that_a_layer_lacks_are_left_out() -> None:
    weights = _weights()
    assert sorted(weights.present()) == ["W_K", "W_O", "W_Q", "W_V", "b_O", "b_V"]
    assert weights.to(torch.float64).W_Q.dtype == torch.float64
    assert weights.to(torch.float64).b_Q is None
