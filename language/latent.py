"""Multi-head latent attention to first order: a layer whose queries, keys and values read x."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import LayerWeights

LATENT = ("W_DQ", "b_DQ", "q_latent", "W_DKV", "b_DKV", "kv_latent")
"""Weights of the latents."""


@torch.no_grad()
def linear(weights: LayerWeights, x: Tensor) -> LayerWeights:
    """Return weights whose queries, keys and values read x itself, as a Lorsa's do.

    A latent's norm divides by its root mean square over a sample, so they are the layer's but for a
    factor of each token. Weights of a layer without latents are returned as they are.

    Args:
        weights: of the layer, in x's dtype, on its device.
        x: a sample of its input, [batch, seq, d_model].
    """
    w = weights
    if w.W_DKV is None or w.kv_latent is None:
        return w
    found = {name: tensor for name, tensor in w.present().items() if name not in LATENT}
    if w.W_DQ is not None and w.q_latent is not None:
        found |= _read_x(x, w.W_DQ, w.b_DQ, w.q_latent, {"Q": w.W_Q})
    found |= _read_x(x, w.W_DKV, w.b_DKV, w.kv_latent, {"K": w.W_K, "V": w.W_V})
    return LayerWeights(**found)


def _read_x(
    x: Tensor, down: Tensor, bias: Tensor | None, weight: Tensor, ups: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return W and b of projections of a latent as ones of x.

    Args:
        x: a sample of the layer's input, [batch, seq, d_model].
        down, bias: projection to the latent, and to channels beside it, [d_model, channels].
        weight: factor of its norm, [rank].
        ups: projections of it by name, each [heads, channels, width].
    """
    rank = len(weight)
    squares = [F.linear(rows, down.T, bias)[:, :rank].square().mean() for rows in x]
    factor = torch.ones_like(down[0])  # [channels]
    factor[:rank] = weight * torch.stack(squares).mean().clamp(min=1e-30).rsqrt()
    found = {f"W_{name}": (down * factor) @ up for name, up in ups.items()}
    if bias is not None:
        found |= {f"b_{name}": (bias * factor) @ up for name, up in ups.items()}
    return found
