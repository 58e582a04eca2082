"""Queries and keys between projection and score: the qk-norm, the clip, then RoPE."""

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .geometry import Alibi, QKNorm, Rope, Stretch

BIAS = 3
"""Channels that a linear bias takes: as many bfloat16 numbers are as exact as a float32."""


class Shaped(Protocol):
    """The shape of a layer or of a Lorsa: what is done to its queries and keys."""

    @property
    def qk_norm(self) -> QKNorm | None:
        """Norm of queries and keys."""

    @property
    def clip(self) -> float | None:
        """Limit of queries and keys, after the norm."""

    @property
    def rope(self) -> Rope | None:
        """Rotation, after the limit."""

    @property
    def stretch(self) -> Stretch | None:
        """Growth of the queries with their position, after the rotation."""

    @property
    def alibi(self) -> Alibi | None:
        """Linear biases of the scores."""

    @property
    def scale(self) -> float:
        """Factor of the scores."""


class Normed(Protocol):
    """The weights of a layer, or a Lorsa: those of the qk-norm, as `normalise` takes them."""

    @property
    def q_norm(self) -> Tensor | None:
        """Factors of the queries."""

    @property
    def k_norm(self) -> Tensor | None:
        """Factors of the keys."""

    @property
    def q_norm_bias(self) -> Tensor | None:
        """Added to the queries."""

    @property
    def k_norm_bias(self) -> Tensor | None:
        """Added to the keys."""


def as_scored(q: Tensor, k: Tensor, by: Shaped, of: Normed) -> tuple[Tensor, Tensor]:
    """Return projected queries and keys as they enter the score.

    Args:
        q, k: [batch, seq, heads, d_head]; positions are 0..seq - 1.
        by: the shape of the layer or Lorsa whose they are.
        of: its weights.

    Returns:
        q and k, alike; with linear biases of as many heads as q has, and BIAS channels more.
    """
    one, other = (of.q_norm, of.q_norm_bias), (of.k_norm, of.k_norm_bias)
    q, k = (
        norm_and_rotate(part, norm=by.qk_norm, weight=weight, bias=bias, clip=by.clip, rope=by.rope)
        for part, (weight, bias) in ((q, one), (k, other))
    )
    if by.stretch is not None:
        q = q * _growth(q, by.stretch)
    return (q, k) if by.alibi is None else _with_bias(q, k, by.alibi, by.scale)


def _growth(q: Tensor, stretch: Stretch) -> Tensor:
    """Return the factor of queries [batch, seq, heads, d_head] by position, [seq, 1, 1]."""
    position = torch.arange(q.shape[1], dtype=torch.float32, device=q.device)
    steps = ((position + stretch.first) / stretch.every).floor()
    return (1 + stretch.gain * steps.log1p()).to(q.dtype)[:, None, None]


def _with_bias(q: Tensor, k: Tensor, alibi: Alibi, scale: float) -> tuple[Tensor, Tensor]:
    """Return q and k with channels whose product is the bias, so that any attention adds it."""
    position = torch.arange(k.shape[1], dtype=torch.float32, device=k.device)
    rest = position[:, None] * torch.tensor(alibi.slopes, device=k.device)  # [seq, heads]
    if alibi.rounded:
        rest = rest.bfloat16().float()
    if alibi.cast is not None:
        rest = (rest * scale).to(getattr(torch, alibi.cast)).float() / scale
    if not alibi.scaled:
        rest = rest / scale
    parts = []
    for _ in range(BIAS):  # each is exact in any precision
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    bias = torch.stack(parts, dim=-1).to(k.dtype).expand(len(k), -1, -1, -1)
    return torch.cat([q, torch.ones_like(bias)], dim=-1), torch.cat([k, bias], dim=-1)


def norm_and_rotate(
    x: Tensor,
    *,
    norm: QKNorm | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    clip: float | None = None,
    rope: Rope | None,
) -> Tensor:
    """Return projected queries or keys normalised, limited and rotated.

    Args:
        x: [batch, seq, heads, d_head]; positions are 0..seq - 1.
        norm: norm of the queries or keys, if any.
        weight: factor of the norm, [d_head]; where the norm is `by_head`, [heads, d_head].
        bias: what the norm adds, [heads, d_head]; only a norm of kind "layer" may have one.
        clip: limit of their size, if any.
        rope: rotation, if any.

    Returns:
        x's shape and dtype.
    """
    if norm is not None:
        assert weight is not None
        x = normalise(x, norm, weight, bias)
    if clip is not None:
        x = x.clamp(-clip, clip)
    return x if rope is None else rotate(x, rope)


def normalise(x: Tensor, norm: QKNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return queries or keys normalised as the layer does; arguments as of `norm_and_rotate`."""
    wide = centre(x if x.dtype == torch.float64 else x.float(), norm)
    normed = wide * norm_scale(wide, norm)
    return (normed * weight if bias is None else normed * weight + bias).to(x.dtype)


def centre(x: Tensor, norm: QKNorm) -> Tensor:
    """Return queries or keys without their mean over a head's channels, if the norm takes it off.

    Args:
        x: [..., d_head].
        norm: norm of the queries or keys.
    """
    return x - x.mean(dim=-1, keepdim=True) if norm.kind == "layer" else x


def norm_scale(x: Tensor, norm: QKNorm) -> Tensor:
    """Return what a norm multiplies centred queries or keys by, before its weight.

    Args:
        x: [batch, seq, heads, d_head].
        norm: norm of the queries or keys.

    Returns:
        [batch, seq, heads, 1]; [batch, seq, 1, 1] of a norm over all heads.
    """
    if norm.kind == "rms_full":
        return inverse_rms(x.flatten(2), norm.eps)[..., None]
    return inverse_rms(x, norm.eps)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis, which stays with one element."""
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last axis, the mean square taken in fp32 or better.

    Args:
        x: [..., d_head].
        weight: [d_head], or [heads, d_head].
        eps: added to the mean square.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * inverse_rms(wide, eps) * weight).to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate channel pairs of every head by position * inv_freq.

    (a, b) -> (a cos - b sin, b cos + a sin) * attention_scaling

    Args:
        x: queries or keys, [batch, seq, heads, d_head]; positions are 0..seq - 1.
        rope: frequencies; channels from 2 * len(inv_freq) on are left as they are.

    Returns:
        x's shape and dtype.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; angles in fp32 as transformers does.
    """
    _batch, seq, _heads, _width = x.shape
    cos, sin = _cos_sin(rope, seq, x.dtype, x.device)
    turned: Tensor = _Rotate.apply(x, cos, sin, rope.interleaved)
    return turned


class _Rotate(torch.autograd.Function):
    """The rotation without temporary tensors; its gradient is the rotation back."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _x, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)
        ctx.save_for_forward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grads[0], cos, -sin, ctx.interleaved), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        cos, sin = ctx.saved_tensors
        turned: Tensor = _Rotate.apply(tangents[0], cos, sin, ctx.interleaved)
        return turned

    @staticmethod
    def vmap(_info: Any, in_dims: Any, x: Tensor, *others: Any) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        turned: Tensor = _Rotate.apply(x.flatten(0, 1), *others)
        return turned.unflatten(0, x.shape[:2]), 0


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x with its leading channel pairs turned, one sequence after the other.

    Args:
        x: [batch, seq, heads, d_head].
        cos, sin: [seq, 1, n_pairs].
    """
    n_turning = 2 * cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for source, target in zip(x, out, strict=True):  # a sequence stays in the cache
        (a, b), (a_out, b_out) = (_pairs(t[..., :n_turning], interleaved) for t in (source, target))
        torch.mul(a, cos, out=a_out).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=b_out).addcmul_(a, sin)
        target[..., n_turning:] = source[..., n_turning:]
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """View channels as the two sides of pairs, each [..., n_pairs]."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    a, b = x.chunk(2, dim=-1)
    return a, b


@lru_cache(16)
def _cos_sin(
    rope: Rope, seq: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position and pair, [seq, 1, n_pairs]."""
    with torch.inference_mode(False):  # or a cached tensor could not be used in training
        inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
        position = torch.arange(seq, device=device, dtype=torch.float32)
        angle = position[:, None] * inv_freq
        cos = (angle.cos() * rope.attention_scaling).to(dtype)[:, None]
        sin = (angle.sin() * rope.attention_scaling).to(dtype)[:, None]
    return cos, sin
