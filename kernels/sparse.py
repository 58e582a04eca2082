"""Operators on sparse codes with their backwards, made of what each path does its own way.

Four sums are all there is, with `pairs` the slots (t, j) of a code:

    weighted_sums   y[t]     = sum_j acts[t, j] W[ids[t, j]]
    gathered_dots   h[t, j]  = <x[t], W[ids[t, j]]>
    feature_sums    dW[i]    = sum over pairs with ids[t, j] = i of acts[t, j] x[t]; db[i] without x
    best_of_linear  the top_k of x[t] W^T + b, and which they are

The decode is the first; its backward is the second and the third. The dot is the second; its
backward is the first and the third. So is that of the top_k of a linear map, where only what was
kept has a gradient.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sums(Protocol):
    """The four sums of a path, computed in float32 at least whatever the tensors are."""

    def weighted_sums(self, acts: Tensor, ids: Tensor, W: Tensor) -> Tensor:
        """Return y, [tokens, width], dtype of W, of acts and ids [tokens, slots]."""

    def gathered_dots(self, x: Tensor, ids: Tensor, W: Tensor) -> Tensor:
        """Return h, [tokens, slots], dtype of W, of x [tokens, width]."""

    def feature_sums(
        self, acts: Tensor, ids: Tensor, x: Tensor, W: Tensor, *, bias: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return dW, like W, and db, [n_features], where it is asked for."""

    def best_of_linear(
        self, x: Tensor, W: Tensor, b: Tensor, norm: Tensor, *, top_k: int, select: str
    ) -> tuple[Tensor, Tensor]:
        """Return acts, in float32 or float64, and ids, [tokens, top_k] each."""


class SparseDecode(torch.autograd.Function):
    """Weighted sums of rows; see `dispatch.sparse_decode`."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, ids: Tensor, W_O: Tensor, by: Sums) -> Tensor:
        """Return y_hat, [batch, seq, d_model]."""
        ctx.save_for_backward(acts, ids, W_O)
        ctx.by = by
        y_hat = by.weighted_sums(acts.flatten(0, 1), ids.flatten(0, 1), W_O)
        return y_hat.view(*ids.shape[:2], W_O.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return d_acts and dW_O."""
        acts, ids, W_O = ctx.saved_tensors
        dy, flat_ids = grads[0].flatten(0, 1), ids.flatten(0, 1)
        d_acts = dW_O = None
        if ctx.needs_input_grad[0]:
            d_acts = ctx.by.gathered_dots(dy, flat_ids, W_O).view_as(acts)
        if ctx.needs_input_grad[2]:
            dW_O, _ = ctx.by.feature_sums(acts.flatten(0, 1), flat_ids, dy, W_O)
        return d_acts, None, dW_O, None


class SparseDot(torch.autograd.Function):
    """Dot products with gathered rows; see `dispatch.sparse_dot`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, W: Tensor, by: Sums) -> Tensor:
        """Return h, [batch, seq, slots]."""
        ctx.save_for_backward(x, ids, W)
        ctx.by = by
        return by.gathered_dots(x.flatten(0, 1), ids.flatten(0, 1), W).view(ids.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx and dW."""
        x, ids, W = ctx.saved_tensors
        dh, flat_ids = grads[0].flatten(0, 1), ids.flatten(0, 1)
        dx = dW = None
        if ctx.needs_input_grad[0]:
            dx = ctx.by.weighted_sums(dh, flat_ids, W).view_as(x)
        if ctx.needs_input_grad[2]:
            dW, _ = ctx.by.feature_sums(dh, flat_ids, x.flatten(0, 1), W)
        return dx, None, dW, None


class SparseTopkLinear(torch.autograd.Function):
    """The top_k of a linear map; see `dispatch.sparse_topk_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        norm: Tensor,
        top_k: int,
        select: str,
        by: Sums,
    ) -> tuple[Tensor, Tensor]:
        """Return acts and ids, [batch, seq, top_k]."""
        acts, ids = by.best_of_linear(x.flatten(0, 1), W, b, norm, top_k=top_k, select=select)
        fired = acts > 0 if select == "relu" else None
        ctx.save_for_backward(x, W, ids, fired)
        ctx.by = by
        shape = (*x.shape[:2], top_k)
        ids = ids.view(shape)
        ctx.mark_non_differentiable(ids)
        return acts.to(x.dtype).view(shape), ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, dW and db, to which only what fired adds."""
        x, W, ids, fired = ctx.saved_tensors
        dz = grads[0].flatten(0, 1)
        dz = dz if fired is None else torch.where(fired, dz, 0.0)
        dx = dW = db = None
        if ctx.needs_input_grad[0]:
            dx = ctx.by.weighted_sums(dz, ids, W).view_as(x)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            flat_x = x.flatten(0, 1)
            dW, db = ctx.by.feature_sums(dz, ids, flat_x, W, bias=ctx.needs_input_grad[2])
        return dx, dW, db, None, None, None, None


class Operators:
    """The operators on sparse codes of a path, made of its sums."""

    def __init__(self, by: Sums) -> None:
        self._by = by

    def sparse_decode(self, acts: Tensor, ids: Tensor, W_O: Tensor) -> Any:
        """Return y_hat; see `dispatch.sparse_decode`."""
        return SparseDecode.apply(acts, ids, W_O, self._by)

    def sparse_dot(self, x: Tensor, ids: Tensor, W: Tensor) -> Any:
        """Return h; see `dispatch.sparse_dot`."""
        return SparseDot.apply(x, ids, W, self._by)

    def sparse_topk_linear(
        self, x: Tensor, W: Tensor, b: Tensor, norm: Tensor, top_k: int, select: str
    ) -> Any:
        """Return acts and ids; see `dispatch.sparse_topk_linear`."""
        return SparseTopkLinear.apply(x, W, b, norm, top_k, select, self._by)
