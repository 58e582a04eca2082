"""Sums of sparse codes on the torch path: `embedding_bag` and its gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_select import Scratch, compute_dtype, select_top_k

PREACTS_AT_ONCE = 1 << 22
"""Pre-activations of a block of rows: 16 MB in fp32, about what the last cache of a CPU holds."""


def weighted_sums(acts: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """Return sum_j acts[t, j] W[ids[t, j]], [tokens, width]; zeros are left out if many."""
    compute = compute_dtype(W.dtype)
    acts, table = acts.to(compute), W.to(compute)
    fires = acts != 0
    count = fires.sum(dim=1)
    if 2 * int(count.sum()) > acts.numel():
        summed = F.embedding_bag(ids, table, per_sample_weights=acts, mode="sum")
    else:
        starts = count.cumsum(0) - count
        summed = F.embedding_bag(
            ids[fires], table, starts, per_sample_weights=acts[fires], mode="sum"
        )
    return summed.to(W.dtype)


def gathered_dots(x: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """Return <x[t], W[ids[t, j]]>, [tokens, slots]: embedding_bag's gradient of its weights."""
    compute = compute_dtype(W.dtype)
    with torch.enable_grad():
        weights = torch.zeros(ids.shape, dtype=compute, device=x.device, requires_grad=True)
        table = W.detach().to(compute)
        bag = F.embedding_bag(ids, table, per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(bag, weights, x.to(compute))[0].to(W.dtype)


def feature_sums(
    acts: Tensor, ids: Tensor, x: Tensor, W: Tensor, *, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return sum over t, j with ids[t, j] = i of acts[t, j] x[t], like W, and of acts alone.

    The transposed decode: firing pairs sorted by feature, one bag a feature, tokens as the table.
    """
    _tokens, slots = ids.shape
    flat = acts.reshape(-1).to(compute_dtype(W.dtype))
    alive = flat.nonzero()[:, 0]
    features = ids.reshape(-1)[alive]
    by_feature = alive[features.argsort(stable=True)]  # [firing pairs]
    count = features.bincount(minlength=len(W))
    starts, weights, token = count.cumsum(0) - count, flat[by_feature], by_feature // slots

    def summed(table: Tensor) -> Tensor:
        bag = F.embedding_bag(token, table, starts, per_sample_weights=weights, mode="sum")
        return bag.to(W.dtype)

    db = summed(flat.new_ones(len(x), 1))[:, 0] if bias else None
    return summed(x.to(flat.dtype)), db


def best_of_linear(
    x: Tensor, W: Tensor, b: Tensor, norm: Tensor, *, top_k: int, select: str
) -> tuple[Tensor, Tensor]:
    """Return the top_k of x W^T + b by select(.) * norm and which they are, [tokens, top_k] each.

    The dense rows of a few tokens at a time lie in a buffer that is used again.
    """
    compute = compute_dtype(W.dtype)
    x, W, b, norm = (tensor.to(compute) for tensor in (x, W, b, norm))
    acts = x.new_empty(len(x), top_k)
    ids = x.new_empty(len(x), top_k, dtype=torch.int32)
    scratch, step = Scratch(norm), max(1, PREACTS_AT_ONCE // len(W))
    for t in range(0, len(x), step):
        rows = slice(t, min(t + step, len(x)))
        z = scratch.take("z", rows.stop - t, len(W))
        torch.addmm(b, x[rows], W.T, out=z)
        acts[rows], ids[rows] = select_top_k(z, norm, top_k=top_k, select=select, scratch=scratch)
    return acts, ids
