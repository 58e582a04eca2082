"""What happens to queries and keys between their projection and the score: qk-norm, then RoPE."""

from functools import lru_cache

import torch
from torch import Tensor

from .geometry import QKNorm, Rope


def norm_and_rotate(
    x: Tensor, *, norm: QKNorm | None, weight: Tensor | None, rope: Rope | None
) -> Tensor:
    """Return projected queries or keys as they enter the score.

    Args:
        x: [batch, seq, heads, d_head]; positions are 0..seq - 1.
        norm: norm over each head's channels, if any.
        weight: its factor, [d_head].
        rope: rotation, if any.

    Returns:
        x's shape and dtype.
    """
    if norm is not None:
        assert weight is not None
        x = rms_norm(x, weight, norm.eps)
    return x if rope is None else rotate(x, rope)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last axis, the mean square taken in fp32 or better.

    Args:
        x: [..., d_head].
        weight: [d_head].
        eps: added to the mean square.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


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
    n_pairs = len(rope.inv_freq)
    cos, sin = _cos_sin(rope, seq, x.dtype, x.device)
    turning, still = x[..., : 2 * n_pairs], x[..., 2 * n_pairs :]
    if rope.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]  # [batch, seq, heads, n_pairs]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning[..., :n_pairs], turning[..., n_pairs:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


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
