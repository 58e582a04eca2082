"""Queries and keys of one head as affine maps of its layer's input, norms' scales frozen.

    q[t] = (x[t] - b) M_Q[t] + m_Q[t]        k[s] = (x[s] - b) M_K[s] + m_K[s]

for the x that the head is frozen at, to rounding; b is the bias of the norm in front of the layer.
M[t] is the projection, the factor of the qk-norm at t (its scale times its weight), the rotation
and the growth of queries; m[t] is what biases of projections and norms make of it. Where queries
and keys are limited, a channel that lies beyond the limit is a constant. Latents of multi-head
latent attention are affine too, their norms frozen.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ...dictionaries.lorsa.config import LorsaConfig
from ...dictionaries.lorsa.module import Lorsa
from ...kernels.reference import attention_pattern, attention_scores
from ...language.attention import LayerWeights, latents, project
from ...language.geometry import AttentionGeometry, QKNorm
from ...language.qk import as_scored, centre, inverse_rms, norm_scale, normalise

Shape = AttentionGeometry | LorsaConfig
"""Shape of the layer's own attention, or of the Lorsa in its place."""


class Side(NamedTuple):
    """The queries or the keys of a head as an affine map at each of T positions."""

    W: Tensor
    """Projection of what is read, centred where the norm centres, [d_read, d_head]"""
    b: Tensor
    """Bias of the projection, [d_head]"""
    gain: Tensor
    """Factor at each position: the norm's, and 0 where a limit acts, [T, d_head]"""
    shift: Tensor
    """Added after it: the norm's bias, or the limit, [T, d_head]"""
    turn: Tensor
    """Rotation, and growth of queries, [T, d_head, d_head]"""
    down: Tensor | None = None
    """Projection to the latent that is read in place of x, [d_model, d_read]"""
    b_down: Tensor | None = None
    """Bias of that, [d_read]"""
    passes: Tensor | None = None
    """Factor of the latent at each position: its norm's, [T, d_read]"""

    def linear(self, first: int, stop: int) -> Tensor:
        """Return M of positions first to stop - 1, [n, d_model, d_head]."""
        W, at = self.W[None], slice(first, stop)
        if self.down is not None and self.passes is not None:
            W = (self.down * self.passes[at, None]) @ self.W
        return W * self.gain[at, None] @ self.turn[at]

    def constant(self, first: int, stop: int) -> Tensor:
        """Return m of positions first to stop - 1, [n, d_head]."""
        b, at = self.b, slice(first, stop)
        if self.b_down is not None and self.passes is not None:
            b = (self.b_down * self.passes[at]) @ self.W + b
        made = b * self.gain[at] + self.shift[at]
        return (made[:, None] @ self.turn[at])[:, 0]

    def after(self, bias: Tensor | None) -> Self:
        """Return the maps of x less a bias [d_model] that is in x; their constants have it."""
        if bias is None:
            return self
        if self.down is None:
            return self._replace(b=self.b + bias @ self.W)
        beside = bias @ self.down
        return self._replace(b_down=beside if self.b_down is None else self.b_down + beside)


class Row(NamedTuple):
    """The scores of one query with every key."""

    score: Tensor
    """Score as it enters the softmax, -inf where the query may not look, [T]"""
    pattern: Tensor
    """[T]; sums to 1, or less with a sink"""
    slope: Tensor
    """Derivative of the score by <q, k>: the scale, times that of a cap, [T]"""
    product: Tensor
    """<q, k> without linear biases, [T]"""


class Head(NamedTuple):
    """One head, frozen at one input of T positions."""

    queries: Side
    keys: Side
    q: Tensor
    """Queries as they enter the score, [T, width]"""
    k: Tensor
    """Keys, alike; with linear biases both have channels beyond d_head"""
    shape: Shape
    sink: Tensor | None
    """Score of what the head attends to besides, which has no value, [1]"""

    @classmethod
    def of_layer(
        cls,
        x: Tensor,
        weights: LayerWeights,
        geometry: AttentionGeometry,
        head: int,
        bias: Tensor | None = None,
    ) -> Self:
        """Freeze a head of a layer's own attention.

        Args:
            x: the layer's input on one prompt, after the norm in front of it, [T, d_model].
            weights: in x's dtype, on its device.
            geometry: of the layer.
            head: query head; with grouped heads it has the keys of its group.
            bias: part of x that no node makes, the norm's bias, [d_model].
        """
        made = cls._freeze(x, weights, geometry, head, latents(x[None], weights, geometry))
        w = weights
        if w.W_DKV is None or w.kv_latent is None or geometry.latent is None:
            return made.after(bias)
        queries, keys = made.queries, made.keys
        if w.W_DQ is not None and w.q_latent is not None:
            passes = _latent_gain(x, w.W_DQ, w.b_DQ, w.q_latent, geometry.latent)
            queries = queries._replace(down=w.W_DQ, b_down=w.b_DQ, passes=passes)
        passes = _latent_gain(x, w.W_DKV, w.b_DKV, w.kv_latent, geometry.latent)
        keys = keys._replace(down=w.W_DKV, b_down=w.b_DKV, passes=passes)
        return made._replace(queries=queries, keys=keys).after(bias)

    @classmethod
    def of_lorsa(cls, x: Tensor, lorsa: Lorsa, head: int, bias: Tensor | None = None) -> Self:
        """Freeze a QK head of a Lorsa; x and bias as of `of_layer`."""
        return cls._freeze(x, lorsa, lorsa.config, head, (x[None], x[None])).after(bias)

    def after(self, bias: Tensor | None) -> Self:
        """Return the same head, a bias [d_model] of x in its constants."""
        return self._replace(queries=self.queries.after(bias), keys=self.keys.after(bias))

    @classmethod
    def _freeze(
        cls,
        x: Tensor,
        weights: LayerWeights | Lorsa,
        shape: Shape,
        head: int,
        reads: Sequence[Tensor],
    ) -> Self:
        """Freeze a head whose queries and keys read x, or latents of it, [1, T, d_read] each."""
        w = weights
        q, k = project(reads[0], w.W_Q, w.b_Q), project(reads[1], w.W_K, w.b_K)
        scored_q, scored_k = as_scored(q, k, shape, w)
        group = q.shape[2] // k.shape[2]
        turns = _turns(x, shape, w, q.shape[-1])
        queries = _side(q, w.W_Q, w.b_Q, (w.q_norm, w.q_norm_bias), shape, head, turns[0])
        keys = _side(k, w.W_K, w.b_K, (w.k_norm, w.k_norm_bias), shape, head // group, turns[1])
        key_head = head // (scored_q.shape[2] // scored_k.shape[2])
        sink = None if w.sinks is None else w.sinks[head : head + 1]
        return cls(queries, keys, scored_q[0, :, head], scored_k[0, :, key_head], shape, sink)

    def row(self, query: int) -> Row:
        """Return the scores of the query at a position with every key."""
        q, k, at = self._of(query)
        score = attention_scores(q, k, self.shape, at)[0, 0, 0]
        slope = torch.full_like(score, self.shape.scale)
        if self.shape.softcap is not None:
            slope = slope * (1 - (score.clamp(min=-self.shape.softcap) / self.shape.softcap) ** 2)
        width = self.keys.W.shape[1]
        product = self.k[:, :width] @ self.q[query, :width]
        return Row(score, self.pattern(query), slope, product)

    def pattern(self, query: int, without: Tensor | None = None) -> Tensor:
        """Return what the query at a position attends to, [T].

        Args:
            query: its position.
            without: taken off <q, k> of every key, before scale, cap and softmax, [T].
        """
        q, k, at = self._of(query)
        if without is not None:  # a channel of one, whose product is what is taken off
            q = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1)
            k = torch.cat([k, -without[None, :, None, None]], dim=-1)
        return attention_pattern(q, k, self.shape, at, self.sink)[0, 0, 0]

    def _of(self, query: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and the position of a query as attention takes them."""
        at = torch.tensor([query], device=self.q.device)
        return self.q[None, at, None], self.k[None, :, None], at


def _side(
    y: Tensor,
    W: Tensor,
    b: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None],
    shape: Shape,
    head: int,
    turn: Tensor,
) -> Side:
    """Return the affine maps of a head's queries or keys.

    Args:
        y: projected queries or keys of all heads, [1, T, heads, d_head].
        W, b: their projection, [heads, d_read, d_head] and [heads, d_head].
        norm: weight and bias of the qk-norm.
        shape: of the layer or Lorsa.
        head: the head's index in y.
        turn: what comes after norm and limit, [T, d_head, d_head].
    """
    bias = torch.zeros_like(y[0, 0, head]) if b is None else b[head].detach()
    gain, shift = torch.ones_like(y[0, :, head]), torch.zeros_like(y[0, :, head])
    W, value = W[head].detach(), y[0, :, head]
    weight, added = norm
    if shape.qk_norm is not None and weight is not None:
        W, bias = centre(W, shape.qk_norm), centre(bias, shape.qk_norm)
        gain = _norm_gain(y, weight, shape.qk_norm)[0, :, head]
        value = normalise(y, shape.qk_norm, weight, added)[0, :, head]
        shift = shift if added is None else added.expand_as(y)[0, :, head]
    if shape.clip is not None:
        beyond = value.abs() > shape.clip
        gain = gain.masked_fill(beyond, 0)
        shift = torch.where(beyond, value.clamp(-shape.clip, shape.clip), shift)
    return Side(W, bias, gain, shift, turn)


def _norm_gain(y: Tensor, weight: Tensor, norm: QKNorm) -> Tensor:
    """Return what a qk-norm multiplies y [1, T, heads, d_head] by once y is centred, y's shape."""
    return (norm_scale(centre(y, norm), norm) * weight).expand_as(y)


def _turns(x: Tensor, shape: Shape, weights: LayerWeights | Lorsa, d_head: int) -> list[Tensor]:
    """Return what is done to queries and keys after norm and limit, two of [T, d_head, d_head].

    The rows of the unit matrix go through `as_scored` as so many heads, without norm and limit.
    """
    unit = torch.eye(d_head, dtype=x.dtype, device=x.device).expand(1, len(x), -1, -1)
    plain = replace(shape, qk_norm=None, clip=None, alibi=None)
    return [turned[0] for turned in as_scored(unit, unit, plain, weights)]


def _latent_gain(x: Tensor, down: Tensor, b: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Return the factors of a latent's channels at each position, 1 of those that are not normed.

    Args:
        x: [T, d_model].
        down, b: projection to the latent, [d_model, d_read], and its bias.
        weight: factor of the norm, which has the leading channels, [rank].
        eps: of the norm.
    """
    latent = x @ down if b is None else x @ down + b
    gain = torch.ones_like(latent)
    gain[:, : len(weight)] = inverse_rms(latent[:, : len(weight)], eps) * weight
    return gain
