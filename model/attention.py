"""One attention layer of the language model as a plain function of its weights and geometry.

    q = rope(qk_norm(x W_Q + b_Q))    k = rope(qk_norm(x W_K + b_K))    v = x W_V + b_V
    y[t] = sum over heads of (sum_{s <= t} pattern[t, s] v[s]) W_O + b_O

Used to check that the geometry read off a model is right, and to start a Lorsa from the layer.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import attention_pattern
from .geometry import AttentionGeometry
from .qk import rms_norm, rotate


class LayerWeights(NamedTuple):
    """The parameters of one attention layer; b_* and *_norm are None where the layer has none."""

    W_Q: Tensor
    """[n_heads, d_model, d_head]"""
    W_K: Tensor
    """[n_kv_heads, d_model, d_head]"""
    W_V: Tensor
    """[n_kv_heads, d_model, d_head]"""
    W_O: Tensor
    """[n_heads, d_head, d_model]"""
    b_Q: Tensor | None = None
    """[n_heads, d_head]"""
    b_K: Tensor | None = None
    """[n_kv_heads, d_head]"""
    b_V: Tensor | None = None
    """[n_kv_heads, d_head]"""
    b_O: Tensor | None = None
    """[d_model]"""
    q_norm: Tensor | None = None
    """Factor on the normalised queries, [d_head]"""
    k_norm: Tensor | None = None
    """Factor on the normalised keys, [d_head]"""

    def to(self, *args: Any) -> "LayerWeights":
        """Return the weights with every tensor moved or cast as `Tensor.to` does."""
        return LayerWeights(**{name: w.to(*args) for name, w in self.present().items()})

    def present(self) -> dict[str, Tensor]:
        """Return the tensors that the layer has, by name."""
        return {name: w for name, w in self._asdict().items() if w is not None}


def project(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """Return x W + b per head.

    Args:
        x: [batch, seq, d_model].
        W: [heads, d_model, width].
        b: [heads, width] or None.

    Returns:
        [batch, seq, heads, width].
    """
    batch, seq, d_model = x.shape
    heads, _d_model, width = W.shape
    rows = W.transpose(1, 2).reshape(heads * width, d_model)
    flat = F.linear(x, rows, None if b is None else b.reshape(-1))
    return flat.view(batch, seq, heads, width)


def queries_keys(
    x: Tensor, weights: LayerWeights, geometry: AttentionGeometry
) -> tuple[Tensor, Tensor]:
    """Return the layer's rotated queries and keys, key heads repeated for every query head.

    Args:
        x: attention input, [batch, seq, d_model].

    Returns:
        q, k: [batch, seq, n_heads, d_head].
    """
    q = project(x, weights.W_Q, weights.b_Q)
    k = project(x, weights.W_K, weights.b_K)
    if geometry.qk_norm is not None:
        assert weights.q_norm is not None
        assert weights.k_norm is not None
        q = rms_norm(q, weights.q_norm, geometry.qk_norm.eps)
        k = rms_norm(k, weights.k_norm, geometry.qk_norm.eps)
    if geometry.rope is not None:
        q, k = rotate(q, geometry.rope), rotate(k, geometry.rope)
    return q, k.repeat_interleave(geometry.n_heads // geometry.n_kv_heads, dim=2)


def head_outputs(x: Tensor, weights: LayerWeights, geometry: AttentionGeometry) -> Tensor:
    """Return each head's attended value before the output projection.

    Args:
        x: attention input, [batch, seq, d_model].

    Returns:
        [batch, seq, n_heads, d_head].
    """
    q, k = queries_keys(x, weights, geometry)
    v = project(x, weights.W_V, weights.b_V)
    v = v.repeat_interleave(geometry.n_heads // geometry.n_kv_heads, dim=2)
    pattern = attention_pattern(
        q, k, scale=geometry.scale, window=geometry.window, softcap=geometry.softcap
    )
    return torch.einsum("bhts,bshk->bthk", pattern, v)  # [batch, seq, n_heads, d_head]


def layer_attention(x: Tensor, weights: LayerWeights, geometry: AttentionGeometry) -> Tensor:
    """Recompute the layer's output y from its input x, one sequence at a time.

    Args:
        x: attention input after the norm, [batch, seq, d_model], dtype and device of the weights.

    Returns:
        y: attention output before the residual add, [batch, seq, d_model].
    """
    y = torch.empty_like(x)
    for b in range(len(x)):
        o = head_outputs(x[b : b + 1], weights, geometry)
        y[b] = torch.einsum("bthk,hkd->btd", o, weights.W_O)[0]
    return y if weights.b_O is None else y + weights.b_O
