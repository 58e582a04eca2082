"""What happens to queries and keys between their projection and the score: qk-norm, then RoPE."""

import torch
from torch import Tensor

from .geometry import Rope


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
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=x.device)
    angle = torch.arange(seq, device=x.device, dtype=torch.float32)[:, None] * inv_freq
    cos = (angle.cos() * rope.attention_scaling).to(x.dtype)[:, None]  # [seq, 1, n_pairs]
    sin = (angle.sin() * rope.attention_scaling).to(x.dtype)[:, None]
    turning, still = x[..., : 2 * n_pairs], x[..., 2 * n_pairs :]
    if rope.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]  # [batch, seq, heads, n_pairs]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning[..., :n_pairs], turning[..., n_pairs:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned
