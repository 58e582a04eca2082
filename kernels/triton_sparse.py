"""Sums of sparse codes in Triton, none of them atomic: the bits are the same each time.

weighted_sums   a program a token and block of channels
gathered_dots   a program a token, block of slots and slice of channels
feature_sums    a program a feature and block of channels, over its pairs, sorted
best_of_linear  a tiled product into a scratch of some rows, then the exact top_k of each
"""

from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels
from .triton_select import select_top_k

DECODE_SLOTS = 16
DECODE_CHANNELS = 256
DECODE_TILE = {"BLOCK_J": DECODE_SLOTS, "BLOCK_D": DECODE_CHANNELS}
"""Tile of the decode kernels: slots (or tokens) by channels."""
SCRATCH_BYTES = 256 << 20
"""Bytes of pre-activations held at once; one row at least."""
LINEAR_TILES = {2: (128, 128, 64, 8), 4: (64, 128, 32, 8)}
"""Tokens, features, channels and warps of a tile of the linear map, by bytes of an element."""


def weighted_sums(acts: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """Return sum_j acts[t, j] W[ids[t, j]], [tokens, width]."""
    acts, ids, W = acts.contiguous(), ids.contiguous(), W.contiguous()
    (n_tokens, slots), width = ids.shape, W.shape[1]
    y = W.new_empty(n_tokens, width)
    triton_kernels.decode_kernel[n_tokens, triton.cdiv(width, DECODE_CHANNELS)](
        acts, ids, W, y, slots, width, **DECODE_TILE
    )
    return y


def gathered_dots(x: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """Return <x[t], W[ids[t, j]]>, [tokens, slots].

    A slice of channels comes after the other: that much of W stays in the cache.
    """
    x, ids, W = x.contiguous(), ids.contiguous(), W.contiguous()
    (n_tokens, slots), width = ids.shape, W.shape[1]
    n_slices = triton.cdiv(width, DECODE_CHANNELS)
    parts = W.new_empty(n_slices, n_tokens, slots, dtype=torch.float32)
    triton_kernels.dots_kernel[n_tokens, triton.cdiv(slots, DECODE_SLOTS), n_slices](
        x, ids, W, parts, n_tokens, slots, width, **DECODE_TILE
    )
    return parts.sum(dim=0).to(W.dtype)


def feature_sums(
    acts: Tensor, ids: Tensor, x: Tensor, W: Tensor, *, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return sum over t, j with ids[t, j] = i of acts[t, j] x[t], like W, and of acts alone."""
    acts, x = acts.contiguous(), x.contiguous()
    n_features, width = W.shape
    features, pairs = ids.flatten().sort(stable=True)
    edges = torch.arange(n_features + 1, device=ids.device, dtype=features.dtype)
    starts = torch.searchsorted(features, edges)
    dW = torch.empty_like(W, memory_format=torch.contiguous_format)
    db = W.new_empty(n_features) if bias else None
    triton_kernels.dw_kernel[n_features, triton.cdiv(width, DECODE_CHANNELS)](
        acts, x, pairs, starts, dW, db, ids.shape[1], width, **DECODE_TILE
    )
    return dW, db


def linear_constants(dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of the kernel of the linear map."""
    tokens, features, channels, warps = LINEAR_TILES[dtype.itemsize]
    return {
        "BLOCK_T": tokens,
        "BLOCK_N": features,
        "BLOCK_K": channels,
        "PRECISION": "tf32x3" if dtype == torch.float32 else None,
        "num_warps": warps,
    }


def best_of_linear(
    x: Tensor, W: Tensor, b: Tensor, norm: Tensor, *, top_k: int, select: str
) -> tuple[Tensor, Tensor]:
    """Return the top_k of x W^T + b by select(.) * norm and which they are, [tokens, top_k] each.

    The pre-activations are summed and kept in fp32: rounded to half precision, many would tie.
    """
    x, W, b, norm = x.contiguous(), W.contiguous(), b.contiguous(), norm.float().contiguous()
    (n_tokens, width), n_features = x.shape, len(W)
    acts = x.new_empty(n_tokens, top_k, dtype=torch.float32)
    ids = x.new_empty(n_tokens, top_k, dtype=torch.int32)
    step = max(1, min(n_tokens, SCRATCH_BYTES // (4 * n_features)))
    scratch = x.new_empty(step, n_features, dtype=torch.float32)
    constants = linear_constants(x.dtype)
    n_tiles = triton.cdiv(n_features, constants["BLOCK_N"])
    for t in range(0, n_tokens, step):
        rows = slice(t, min(t + step, n_tokens))
        z = scratch[: rows.stop - t]
        triton_kernels.linear_kernel[triton.cdiv(len(z), constants["BLOCK_T"]) * n_tiles, 1](
            x[rows], W, b, z, len(z), n_features, width, **constants
        )
        acts[rows], ids[rows] = select_top_k(z, norm, top_k=top_k, select=select)
    return acts, ids
