"""One attention layer of the language model as a plain function of its weights and geometry.

    q = rope(clip(qk_norm(x W_Q + b_Q)))    k = rope(clip(qk_norm(x W_K + b_K)))
    v = clip(x W_V + b_V)
    y[t] = sum over heads of (gate[t] * sum_{s <= t} pattern[t, s] v[s]) W_O + b_O
    gate = sigmoid(x W_G + b_G), where the layer has one

With multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1) queries read
norm(x W_DQ) in place of x, keys and values norm(x W_DKV) and what of that is not normed.

Used to check that the geometry read off a model is right, to start a Lorsa from the layer, and to
derive y where a store keeps x alone.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference import attention_pattern, hidden
from .geometry import AttentionGeometry
from .qk import as_scored, rms_norm


class LayerWeights(NamedTuple):
    """Parameters of one attention layer; b_* and *_norm* are None where the layer has none."""

    W_Q: Tensor
    """[n_heads, d_model, d_head]; in this and the next two, d_model is what is read"""
    W_K: Tensor
    """[n_kv_heads, d_model, d_head]"""
    W_V: Tensor
    """[n_kv_heads, d_model, d_head], or another width of values"""
    W_O: Tensor
    """[n_heads, width of values, d_model]"""
    b_Q: Tensor | None = None
    """[n_heads, d_head]"""
    b_K: Tensor | None = None
    """[n_kv_heads, d_head]"""
    b_V: Tensor | None = None
    """[n_kv_heads, d_head]"""
    b_O: Tensor | None = None
    """[d_model]"""
    q_norm: Tensor | None = None
    """Factor on the normalised queries, [d_head]; with a norm `by_head`, [n_heads, d_head]"""
    k_norm: Tensor | None = None
    """Factor on the normalised keys, [d_head]; with a norm `by_head`, [n_kv_heads, d_head]"""
    q_norm_bias: Tensor | None = None
    """Added to the normalised queries, [n_heads, d_head]"""
    k_norm_bias: Tensor | None = None
    """Added to the normalised keys, [n_kv_heads, d_head]"""
    sinks: Tensor | None = None
    """Score of what each head attends to besides, which has no value, [n_heads]"""
    W_G: Tensor | None = None
    """Gate of what heads attend to, [n_heads, d_model, d_head], or [n_heads, d_model, 1]"""
    b_G: Tensor | None = None
    """[n_heads, d_head or 1]"""
    W_DQ: Tensor | None = None
    """Down-projection to the latent that queries read in place of x, [d_model, q_rank]"""
    b_DQ: Tensor | None = None
    """[q_rank]"""
    q_latent: Tensor | None = None
    """Factor on the normalised latent of the queries, [q_rank]"""
    W_DKV: Tensor | None = None
    """Down-projection to what keys and values read in place of x: the latent, and the channels of
    the keys that rotate, [d_model, kv_rank + channels]"""
    b_DKV: Tensor | None = None
    """[kv_rank + channels]"""
    kv_latent: Tensor | None = None
    """Factor on the normalised latent of keys and values, [kv_rank]"""

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
    """Return the layer's rotated queries and keys.

    Args:
        x: attention input, [batch, seq, d_model].

    Returns:
        q: [batch, seq, n_heads, d_head].
        k: [batch, seq, n_kv_heads, d_head].
        With linear biases both are of n_heads, and have some channels more; see `as_scored`.
    """
    w = weights
    for_q, for_kv = latents(x, w, geometry)
    q, k = project(for_q, w.W_Q, w.b_Q), project(for_kv, w.W_K, w.b_K)
    return as_scored(q, k, geometry, w)


def values(x: Tensor, weights: LayerWeights, geometry: AttentionGeometry) -> Tensor:
    """Return the layer's values, [batch, seq, n_kv_heads, width], of its input x."""
    v = project(latents(x, weights, geometry)[1], weights.W_V, weights.b_V)
    return v if geometry.clip is None else v.clamp(-geometry.clip, geometry.clip)


def latents(x: Tensor, weights: LayerWeights, geometry: AttentionGeometry) -> tuple[Tensor, Tensor]:
    """Return what queries read, and what keys and values read: x itself, or latents of it."""
    w, eps = weights, geometry.latent
    if eps is None or w.W_DKV is None or w.kv_latent is None:
        return x, x
    for_q = x
    if w.W_DQ is not None and w.q_latent is not None:
        for_q = rms_norm(F.linear(x, w.W_DQ.T, w.b_DQ), w.q_latent, eps)
    down = F.linear(x, w.W_DKV.T, w.b_DKV)
    normed, rest = down.tensor_split([len(w.kv_latent)], dim=-1)
    return for_q, torch.cat([rms_norm(normed, w.kv_latent, eps), rest], dim=-1)


def head_outputs(x: Tensor, weights: LayerWeights, geometry: AttentionGeometry) -> Tensor:
    """Return the value that each head attends to, gated, before the output projection.

    Args:
        x: attention input, [batch, seq, d_model], dtype and device of the weights.

    Returns:
        [batch, seq, n_heads, d_head].
    """
    _batch, seq, _d_model = x.shape
    g = geometry
    q, k = queries_keys(x, weights, g)
    v = values(x, weights, g)
    k, v = (part.repeat_interleave(g.n_heads // part.shape[2], dim=2) for part in (k, v))
    if g.softcap is not None or weights.sinks is not None:
        return gated(x, _head_by_head(q, k, v, g, weights.sinks), weights, g)
    position = torch.arange(seq, device=x.device)
    is_plain = all(size is None or size >= seq for size in (g.window, g.chunk))
    sees = None if is_plain else ~hidden(position, position, g)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=sees,
        is_causal=sees is None,
        scale=g.scale,
    )
    return gated(x, out.transpose(1, 2), weights, g)  # [batch, seq, n_heads, d_head]


def gated(x: Tensor, out: Tensor, weights: LayerWeights, geometry: AttentionGeometry) -> Tensor:
    """Return what heads attend to, [batch, seq, n_heads, d_head], times the gate, if any."""
    if weights.W_G is None or geometry.gate is None:
        return out
    return out * opened(project(x, weights.W_G, weights.b_G), geometry.gate)


def opened(logits: Tensor, gate: str) -> Tensor:
    """Return the factors of a gate of some kind."""
    return logits.sigmoid() if gate == "sigmoid" else F.softplus(logits)


def _head_by_head(
    q: Tensor, k: Tensor, v: Tensor, g: AttentionGeometry, sinks: Tensor | None
) -> Tensor:
    """Attend one sequence and head at a time, so that no more than one pattern is in memory."""
    out = torch.empty_like(v)
    for b in range(len(q)):
        for head in range(g.n_heads):
            one = slice(b, b + 1), slice(None), slice(head, head + 1)
            sink = None if sinks is None else sinks[one[2]]
            pattern = attention_pattern(q[one], k[one], g, sinks=sink)
            out[b, :, head] = pattern[0, 0] @ v[b, :, head]
    return out


class Reading(NamedTuple):
    """One way to understand a layer."""

    geometry: AttentionGeometry
    weights: LayerWeights


def layer_attention(x: Tensor, weights: LayerWeights, geometry: AttentionGeometry) -> Tensor:
    """Recompute the layer's output y from its input x.

    Args:
        x: attention input after the norm, [batch, seq, d_model], dtype and device of the weights.

    Returns:
        y: attention output before the residual add, [batch, seq, d_model].
    """
    heads = head_outputs(x, weights, geometry).flatten(2)  # [batch, seq, n_heads * d_head]
    return F.linear(heads, weights.W_O.flatten(0, 1).T, weights.b_O)
