"""Sparse decode on the torch path: `embedding_bag`, and `embedding_bag` again for its backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .torch_select import compute_dtype


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, ids: Tensor, W_O: Tensor) -> Tensor:
        batch, seq, top_k = ids.shape
        compute = compute_dtype(acts.dtype)
        ctx.save_for_backward(acts, ids, W_O)
        flat_acts = acts.reshape(-1, top_k).to(compute)
        y_hat = _weighted_sums(ids.reshape(-1, top_k), flat_acts, W_O.to(compute))
        return y_hat.view(batch, seq, W_O.shape[1]).to(acts.dtype)  # [batch, seq, d_model]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, ids, W_O = ctx.saved_tensors
        top_k = ids.shape[-1]
        compute = compute_dtype(acts.dtype)
        dy = grads[0].reshape(-1, W_O.shape[1]).to(compute)  # [tokens, d_model]
        flat_ids = ids.reshape(-1, top_k)
        d_acts = dW_O = None
        if ctx.needs_input_grad[0]:
            d_acts = _gathered_dot(flat_ids, W_O.to(compute), dy).view_as(acts).to(acts.dtype)
        if ctx.needs_input_grad[2]:
            flat_acts = acts.reshape(-1, top_k).to(compute)
            dW_O = _segmented_sum(flat_ids, flat_acts, dy, len(W_O)).to(W_O.dtype)
        return d_acts, None, dW_O


def _weighted_sums(ids: Tensor, acts: Tensor, W_O: Tensor) -> Tensor:
    """Return sum_j acts[t, j] W_O[ids[t, j]], [tokens, d_model]; zeros are left out if many."""
    fires = acts != 0
    count = fires.sum(dim=1)
    if 2 * int(count.sum()) > acts.numel():
        return F.embedding_bag(ids, W_O, per_sample_weights=acts, mode="sum")
    return F.embedding_bag(
        ids[fires], W_O, count.cumsum(0) - count, per_sample_weights=acts[fires], mode="sum"
    )


def _gathered_dot(ids: Tensor, W_O: Tensor, dy: Tensor) -> Tensor:
    """Return <dy[t], W_O[ids[t, j]]>, [tokens, top_k]: embedding_bag's gradient of its weights."""
    with torch.enable_grad():
        weights = torch.zeros(ids.shape, dtype=dy.dtype, device=dy.device, requires_grad=True)
        bag = F.embedding_bag(ids, W_O.detach(), per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(bag, weights, dy)[0]


def _segmented_sum(ids: Tensor, acts: Tensor, dy: Tensor, n_ov_heads: int) -> Tensor:
    """Return sum over t, j with ids[t, j] = i of acts[t, j] dy[t], [n_ov_heads, d_model].

    The transposed decode: firing pairs sorted by head, one bag per head, tokens as the table.
    """
    _tokens, top_k = ids.shape
    alive = acts.reshape(-1).nonzero()[:, 0]
    heads = ids.reshape(-1)[alive]
    by_head = alive[heads.argsort(stable=True)]  # [firing pairs]
    count = heads.bincount(minlength=n_ov_heads)
    return F.embedding_bag(
        by_head // top_k,
        dy,
        count.cumsum(0) - count,
        per_sample_weights=acts.reshape(-1)[by_head],
        mode="sum",
    )


sparse_decode = _SparseDecode.apply
