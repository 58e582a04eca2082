"""Linear paths of a frozen model: norms, attention of constant pattern, skip connections.

    norm        N(h) = scale[t] weight C h + bias              C h = h, or h less its mean
    attention   v[k] = slope[k] (x[k] W_V) + offset[k]
                y[q] = sum over heads of (gate[q] sum_k pattern[q, k] v[k]) W_O + b_O
    skip        y = W x

Each has its adjoint, by which a gradient of what it gives becomes one of what it reads. Gradients
are [n_pos, batch, d_model], of positions first, first + 1, ...
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ...kernels.reference import attention_pattern
from ...language.attention import Reading, gated, queries_keys
from ...language.norms import Norm


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FrozenNorm:
    """A norm that divides each token by a constant; also what multiplies its output."""

    scale: Tensor
    """[T]"""
    weight: Tensor | None = None
    """[d_model]; None is 1"""
    bias: Tensor | None = None
    """[d_model]; None is 0"""
    centred: bool = False
    """Whether it takes the mean off"""

    @classmethod
    def at(cls, h: Tensor, norm: Norm | None, multiplier: float = 1.0) -> "FrozenNorm":
        """Return a norm at what it reads, times a factor.

        Args:
            h: what it reads, [T, d_model].
            norm: None where there is none.
            multiplier: factor of its output.
        """
        if norm is None:
            return cls(scale=torch.full_like(h[:, 0], multiplier))
        c = norm.centre(h)
        return cls(
            scale=multiplier * (c.square().mean(dim=-1) + norm.eps).rsqrt(),
            weight=norm.weight.to(h),
            bias=multiplier * norm.bias.to(h) if norm.bias.any() else None,
            centred=norm.centred,
        )

    def direction(self, vectors: Tensor) -> Tensor:
        """Return what it makes of vectors [..., d_model] where its scale is 1."""
        if self.centred:
            vectors = vectors - vectors.mean(dim=-1, keepdim=True)
        return vectors if self.weight is None else vectors * self.weight

    def back(self, gradients: Tensor) -> Tensor:
        """Return what gradients of its output [..., d_model] are of its input, at a scale of 1."""
        if self.weight is not None:
            gradients = gradients * self.weight
        return gradients - gradients.mean(dim=-1, keepdim=True) if self.centred else gradients

    def output(self, h: Tensor) -> Tensor:
        """Return its output for h [T, d_model]."""
        y = self.direction(h) * self.scale[:, None]
        return y if self.bias is None else y + self.bias

    def constant(self, vectors: Tensor) -> Tensor:
        """Return what directions of its output [n, d_model] read of its bias, [n]."""
        return vectors.new_zeros(len(vectors)) if self.bias is None else vectors @ self.bias


class Path(Protocol):
    """An affine map of what a module reads to what it gives."""

    mixes: ClassVar[bool]
    """Whether what it gives at a token depends on other tokens"""

    def output(self, x: Tensor) -> Tensor:
        """Return what it gives for x, both [T, d_model]."""

    def back(self, gradients: Tensor, first: int) -> tuple[Tensor, int]:
        """Return gradients of x, and the first position that they are of."""


@dataclass(frozen=True, slots=True, eq=False)
class Skip:
    """The skip connection of a transcoder."""

    mixes: ClassVar[bool] = False
    W: Tensor
    """[d_model, d_model]; rows are outputs"""

    def output(self, x: Tensor) -> Tensor:
        """Return W x; see `Path`."""
        return x @ self.W.T

    def back(self, gradients: Tensor, first: int) -> tuple[Tensor, int]:
        """Return gradients of x, at the positions of those of y; see `Path`."""
        return gradients @ self.W, first


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OwnAttention:
    """Attention of the model itself, with the pattern that it has on the prompt."""

    mixes: ClassVar[bool] = True
    reading: Reading
    """Geometry and weights, as they were read off the model"""
    x: Tensor
    """What it reads on the prompt, [T, d_model]"""
    pattern: Tensor
    """[n_heads, T, T]"""
    W_V: Tensor
    """[n_kv_heads, d_model, width]"""
    W_O: Tensor
    """[n_heads, width, d_model]"""
    b_O: Tensor | None
    """[d_model]"""
    slope: Tensor | None
    """Factor of the values, that of a latent's norm, or 0 where they are limited; None is 1.
    [T, n_kv_heads, width], or 1 for the last two"""
    offset: Tensor | None
    """Added to the values, alike, or 1 for T; None is 0"""
    gate: Tensor | None
    """Factor of what heads attend to, [T, n_heads, width]; None is 1"""

    @classmethod
    def at(cls, x: Tensor, reading: Reading) -> "OwnAttention":
        """Return a layer's attention at what it reads, x [T, d_model]."""
        g, w = reading.geometry, reading.weights
        q, k = queries_keys(x[None], w, g)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # with linear biases they are
        shape = (len(x), *w.W_O.shape[:2])
        has_gate = w.W_G is not None and g.gate is not None
        return cls(
            reading=reading,
            x=x,
            pattern=attention_pattern(q, k, g, sinks=w.sinks)[0],
            W_O=w.W_O,
            b_O=w.b_O,
            gate=gated(x[None], x.new_ones(1, *shape), w, g)[0] if has_gate else None,
            **_values_at(x, reading)._asdict(),
        )

    def output(self, x: Tensor) -> Tensor:
        """Return y of x, both [T, d_model]; see `Path`."""
        v = torch.einsum("kd,gdw->kgw", x, self.W_V)
        v = v if self.slope is None else v * self.slope
        v = v if self.offset is None else v + self.offset
        v = v.repeat_interleave(len(self.W_O) // len(self.W_V), dim=1)  # [T, n_heads, width]
        attended = torch.einsum("hqk,khw->qhw", self.pattern, v)
        attended = attended if self.gate is None else attended * self.gate
        y = attended.flatten(1) @ self.W_O.flatten(0, 1)
        return y if self.b_O is None else y + self.b_O

    def back(self, gradients: Tensor, first: int) -> tuple[Tensor, int]:
        """Return gradients of x at all positions up to the last of those of y; see `Path`."""
        n_pos, batch, d_model = gradients.shape
        n_heads, width, _d_model = self.W_O.shape
        stop = first + n_pos
        of_heads = gradients.view(-1, d_model) @ self.W_O.flatten(0, 1).T
        of_heads = of_heads.view(n_pos, batch, n_heads, width)
        if self.gate is not None:
            of_heads = of_heads * self.gate[first:stop, None]
        patterns = self.pattern[:, first:stop, :stop].transpose(1, 2)  # [n_heads, keys, queries]
        of_values = patterns @ of_heads.permute(2, 0, 1, 3).reshape(n_heads, n_pos, -1)
        n_kv_heads = len(self.W_V)
        of_values = of_values.view(n_kv_heads, -1, stop, batch, width).sum(dim=1)
        of_values = of_values.permute(1, 2, 0, 3)  # [keys, batch, n_kv_heads, width]
        if self.slope is not None:
            of_values = of_values * self.slope[:stop, None]
        rows = self.W_V.transpose(1, 2).reshape(-1, d_model)
        return (of_values.reshape(stop * batch, -1) @ rows).view(stop, batch, d_model), 0


class _Values(NamedTuple):
    """The map from x to the values of a layer's attention."""

    W_V: Tensor
    slope: Tensor | None
    offset: Tensor | None


def _values_at(x: Tensor, reading: Reading) -> _Values:
    """Return how values depend on x where latents' norms and limits are constant."""
    g, w = reading.geometry, reading.weights
    W_V, slope = w.W_V, None
    offset = None if w.b_V is None else w.b_V[None]
    if g.latent is not None and w.W_DKV is not None and w.kv_latent is not None:
        rank = len(w.kv_latent)
        down = x @ w.W_DKV[:, :rank]
        down = down if w.b_DKV is None else down + w.b_DKV[:rank]
        slope = (down.square().mean(dim=-1) + g.latent).rsqrt()[:, None, None]
        up = w.kv_latent[:, None] * w.W_V[:, :rank]  # [n_kv_heads, rank, width]
        W_V = w.W_DKV[:, :rank] @ up
        if w.b_DKV is not None:
            beside = slope * (w.b_DKV[:rank] @ up)
            offset = beside if offset is None else beside + offset
    if g.clip is None:
        return _Values(W_V, slope, offset)
    one, none = x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)
    slope, offset = (one if slope is None else slope), (none if offset is None else offset)
    v = torch.einsum("kd,gdw->kgw", x, W_V) * slope + offset
    is_free = v.abs() < g.clip
    held = v.clamp(-g.clip, g.clip)
    return _Values(W_V, is_free * slope, torch.where(is_free, offset, held))
