"""Rotation and qk-norm against their textbook forms."""

import pytest
import torch
import torch.nn.functional as F
from lorsa.language.attention import LayerWeights
from lorsa.language.geometry import Alibi, AttentionGeometry, QKNorm, Rope, Stretch
from lorsa.language.qk import as_scored, norm_and_rotate, normalise, rms_norm, rotate
from torch import Tensor

FREQUENCIES = (1.0, 0.3, 0.01)


def _turned(pairs: Tensor) -> Tensor:
    """Return complex numbers [batch, seq, heads, pair] times exp(i position frequency)."""
    position = torch.arange(pairs.shape[1], dtype=torch.float64)
    angle = position[:, None] * torch.tensor(FREQUENCIES, dtype=torch.float64)
    return pairs * torch.polar(torch.ones_like(angle), angle)[:, None]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [6, 10], ids=["whole", "partial"])
def test_rotation_is_a_complex_product(interleaved: bool, width: int) -> None:
    x = torch.randn(2, 11, 3, width, generator=torch.Generator().manual_seed(0)).double()
    rope = Rope(inv_freq=FREQUENCIES, attention_scaling=1.5, interleaved=interleaved)
    found = rotate(x, rope)
    a, b = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
    turned = 1.5 * _turned(torch.complex(a, b))
    c, d = (found[..., 0:6:2], found[..., 1:6:2]) if interleaved else found[..., :6].chunk(2, -1)
    assert torch.allclose(torch.complex(c, d), turned, atol=1e-5)
    assert torch.equal(found[..., 6:], x[..., 6:])


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 6).double(), None
    rope = Rope(inv_freq=FREQUENCIES)
    q, k = (rotate(row.expand(1, 20, 1, 6), rope)[0, :, 0] for row in q)
    scores = q @ k.T
    assert torch.allclose(scores[5, 2], scores[17, 14], atol=1e-5)
    assert not torch.allclose(scores[5, 2], scores[5, 3], atol=1e-3)


def test_rms_norm_is_torchs() -> None:
    x, weight = torch.randn(2, 3, 4, 8), torch.rand(8)
    assert torch.allclose(rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    half = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    assert half.dtype == torch.bfloat16


def test_a_norm_over_all_heads_is_torchs() -> None:
    """As OLMo 2 has it; heads repeated equally often are normalised as before."""
    x, weight = torch.randn(2, 3, 4, 8), torch.rand(4, 8)
    norm = QKNorm(eps=1e-5, kind="rms_full")
    found = normalise(x, norm, weight)
    expected = F.rms_norm(x.flatten(2), (32,), weight.flatten(), 1e-5).view_as(x)
    assert torch.allclose(found, expected, atol=1e-6)
    twice = normalise(x.repeat_interleave(2, dim=2), norm, weight.repeat_interleave(2, dim=0))
    assert torch.allclose(twice, found.repeat_interleave(2, dim=2), atol=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layer_norm_of_each_head_is_torchs(with_bias: bool) -> None:
    x, weight = torch.randn(2, 3, 4, 8), torch.rand(4, 8)
    bias = torch.randn(4, 8) if with_bias else None
    found = normalise(x, QKNorm(eps=1e-5, kind="layer"), weight, bias)
    for head in range(4):
        own = None if bias is None else bias[head]
        expected = F.layer_norm(x[:, :, head], (8,), weight[head], own, 1e-5)
        assert torch.allclose(found[:, :, head], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["rms_full", "layer"])
def test_the_gradients_of_norms_by_head(kind: str) -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = QKNorm(eps=1e-5, kind=kind)
    assert torch.autograd.gradcheck(lambda *a: normalise(a[0], norm, *a[1:]), (x, weight, bias))


def test_the_norm_comes_before_the_rotation() -> None:
    x, weight = torch.randn(1, 5, 1, 6), torch.rand(6)
    rope, norm = Rope(inv_freq=FREQUENCIES), QKNorm(eps=1e-6)
    expected = rotate(rms_norm(x, weight, 1e-6), rope)
    assert torch.equal(norm_and_rotate(x, norm=norm, weight=weight, rope=rope), expected)
    assert torch.equal(norm_and_rotate(x, norm=None, weight=None, rope=None), x)


def test_a_rotation_first_used_in_inference_mode_can_be_trained_through() -> None:
    """Angles are kept from call to call; a tensor of inference mode cannot enter autograd."""
    rope = Rope(inv_freq=(0.7, 0.07, 0.007))
    with torch.inference_mode():
        rotate(torch.randn(1, 4, 1, 6), rope)
    x = torch.randn(1, 4, 1, 6, requires_grad=True)
    rotate(x, rope).sum().backward()
    assert x.grad is not None


def test_a_rotation_can_be_transformed_by_torch_func() -> None:
    """Patterns and z_pre are differentiated in analyses, forward, backward and for many at once."""
    rope = Rope(inv_freq=FREQUENCIES)
    x, tangent = torch.randn(2, 4, 5, 2, 6).double()
    x, tangent = x[:1], tangent[:1]

    def turn(x: Tensor) -> Tensor:
        return rotate(x, rope)

    _, found = torch.func.jvp(turn, (x,), (tangent,))
    assert torch.equal(found, turn(tangent))  # it is linear
    many = torch.stack((x, tangent), dim=1)
    assert torch.equal(torch.func.vmap(turn, in_dims=1)(many)[1], turn(tangent))
    gradient = torch.func.grad(lambda x: (turn(x) * turn(tangent)).sum())(x)
    assert torch.allclose(gradient, tangent)
    assert torch.autograd.gradgradcheck(turn, (x[:, :2].requires_grad_(),))


def test_the_gradient_of_a_partial_rotation() -> None:
    x = torch.randn(2, 3, 2, 10, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        rope = Rope(inv_freq=FREQUENCIES, attention_scaling=1.5, interleaved=interleaved)
        assert torch.autograd.gradcheck(lambda x, rope=rope: rotate(x, rope), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_linear_biases_are_added_to_the_scores(
    dtype: torch.dtype, scaled: bool, rounded: bool
) -> None:
    """Those of far positions to the digit, in half precision too."""
    seq, scale, slopes = 1500, 0.3, (0.7071, 2**-8.5)
    alibi = Alibi(slopes=slopes, scaled=scaled, rounded=rounded)
    g = AttentionGeometry(d_model=8, n_heads=2, n_kv_heads=1, d_head=4, scale=scale, alibi=alibi)
    weights = LayerWeights(*torch.zeros(4, 1))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, seq, n, 4, generator=generator).to(dtype) for n in (2, 1))
    ours = [part[0].double() for part in as_scored(q, k, g, weights)]
    scores = scale * torch.einsum("thd,shd->hts", *ours)
    bias = torch.tensor(slopes)[:, None] * torch.arange(seq)
    bias = bias.bfloat16().double() if rounded else bias.double()
    plain = torch.einsum("thd,sd->hts", q[0].double(), k[0, :, 0].double())
    expected = scale * (plain + bias[:, None]) if scaled else scale * plain + bias[:, None]
    assert (scores - expected).abs().max() < 1e-3


def test_biases_of_more_heads_are_those_of_the_heads() -> None:
    alibi = Alibi(slopes=(0.5, 0.25))
    assert alibi.of_heads(4).slopes == (0.5, 0.5, 0.25, 0.25)
    assert alibi.of_heads(3).slopes == (0.5, 0.5, 0.25)


def test_queries_grow_with_their_position() -> None:
    stretch = Stretch(gain=0.4, every=5, first=1)
    g = AttentionGeometry(d_model=8, n_heads=1, n_kv_heads=1, d_head=4, scale=1.0, stretch=stretch)
    ones = torch.ones(1, 12, 1, 4)
    q, k = as_scored(ones, ones, g, LayerWeights(*torch.zeros(4, 1)))
    steps = torch.tensor([0] * 4 + [1] * 5 + [2] * 3)
    assert torch.allclose(q[0, :, 0, 0], 1 + 0.4 * (1 + steps).log())
    assert torch.equal(k, ones)
