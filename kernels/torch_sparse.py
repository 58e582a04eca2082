"""Sums of sparse codes on the torch path: `embedding_bag` and its gradients, in blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_blocks import each_block
from .torch_select import Scratch, compute_dtype, select_top_k

TOKENS_AT_ONCE = 256
RANKED_AT_ONCE = 64
FEATURE_BLOCKS = 8
PREACTS_AT_ONCE = 1 << 22
"""Pre-activations of a block of tokens, at most: 16 MB in fp32."""


def _at_once(by_token: Tensor) -> int:
    """Return how many tokens make a block: on a GPU all do, there are no caches to keep to."""
    return TOKENS_AT_ONCE if by_token.device.type == "cpu" else len(by_token)


def weighted_sums(acts: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """Return sum_j acts[t, j] W[ids[t, j]], [tokens, width]; zeros are left out if many."""
    compute = compute_dtype(W.dtype)
    table, y = W.to(compute), W.new_empty(len(ids), W.shape[1])

    def work(tokens: slice, _: Scratch) -> None:
        y[tokens] = _sums_of_block(acts[tokens].to(compute), ids[tokens], table)

    each_block(len(ids), _at_once(y), work, y)
    return y


def _sums_of_block(acts: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Return the weighted sums of a block of tokens."""
    fires = acts != 0
    count = fires.sum(dim=1)
    if 2 * int(count.sum()) > acts.numel():
        return F.embedding_bag(ids, table, per_sample_weights=acts, mode="sum")
    starts, fired = count.cumsum(0) - count, acts[fires]
    return F.embedding_bag(ids[fires], table, starts, per_sample_weights=fired, mode="sum")


def gathered_dots(x: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """Return <x[t], W[ids[t, j]]>, [tokens, slots]: embedding_bag's gradient of its weights."""
    compute, slots = compute_dtype(W.dtype), ids.shape[1]
    table, h = W.to(compute), W.new_empty(ids.shape)

    def work(tokens: slice, _: Scratch) -> None:
        token = torch.arange(tokens.stop - tokens.start, dtype=ids.dtype, device=ids.device)
        h[tokens] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x[tokens].to(compute),
            table,
            ids[tokens].flatten(),
            token * slots,
            token.repeat_interleave(slots),
            0,
        ).view(-1, slots)

    each_block(len(ids), _at_once(h), work, h)
    return h


def feature_sums(
    acts: Tensor, ids: Tensor, x: Tensor, W: Tensor, *, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return sum over t, j with ids[t, j] = i of acts[t, j] x[t], like W, and of acts alone.

    The transposed decode: firing pairs sorted by feature, one bag a feature, tokens as the table.
    """
    (_tokens, slots), n_features = ids.shape, len(W)
    flat, flat_ids = acts.reshape(-1).to(compute_dtype(W.dtype)), ids.reshape(-1)
    table, ones = x.to(flat.dtype), flat.new_ones(len(x), 1)
    dW, db = W.new_empty(W.shape), W.new_empty(n_features) if bias else None

    def work(features: slice, _: Scratch) -> None:
        here = (flat != 0) & (features.start <= flat_ids) & (flat_ids < features.stop)
        alive = here.nonzero()[:, 0]
        feature = flat_ids[alive] - features.start
        by_feature = alive[feature.argsort(stable=True)]  # [firing pairs]
        count = feature.bincount(minlength=features.stop - features.start)
        starts, weights, token = count.cumsum(0) - count, flat[by_feature], by_feature // slots

        def summed(by_token: Tensor) -> Tensor:
            return F.embedding_bag(token, by_token, starts, per_sample_weights=weights, mode="sum")

        dW[features] = summed(table)
        if db is not None:
            db[features] = summed(ones)[:, 0]

    each_block(n_features, -(-n_features // FEATURE_BLOCKS), work, dW)
    return dW, db


def best_of_linear(
    x: Tensor, W: Tensor, b: Tensor, norm: Tensor, *, top_k: int, select: str
) -> tuple[Tensor, Tensor]:
    """Return the top_k of x W^T + b by select(.) * norm and which they are, [tokens, top_k] each.

    The dense rows of a block of tokens lie in a buffer that is used again.
    """
    compute = compute_dtype(W.dtype)
    x, W, b, norm = (tensor.to(compute) for tensor in (x, W, b, norm))
    acts = x.new_empty(len(x), top_k)
    ids = x.new_empty(len(x), top_k, dtype=torch.int32)

    def work(tokens: slice, scratch: Scratch) -> None:
        z = scratch.take("z", tokens.stop - tokens.start, len(W))
        torch.addmm(b, x[tokens], W.T, out=z)
        few = (t.split(RANKED_AT_ONCE) for t in (z, acts[tokens], ids[tokens]))
        for rows, kept, of in zip(*few, strict=True):
            kept[:], of[:] = select_top_k(rows, norm, top_k=top_k, select=select, scratch=scratch)

    at_once = max(1, min(_at_once(x), PREACTS_AT_ONCE // len(W)))
    each_block(len(x), at_once, work, acts, buffers={"z": at_once * len(W)})
    return acts, ids
