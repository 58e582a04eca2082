"""The Triton path: the operators of reference.py as fused kernels, for GPUs."""

from typing import Any

from torch import Tensor

from . import triton_sparse
from .sparse import SparseDecode, SparseDot, SparseTopkLinear
from .triton_attention import sparse_topk_attention
from .triton_select import select_top_k

__all__ = [
    "select_top_k",
    "sparse_decode",
    "sparse_dot",
    "sparse_topk_attention",
    "sparse_topk_linear",
]


def sparse_decode(acts: Tensor, ids: Tensor, W_O: Tensor) -> Any:
    """Return y_hat; see `dispatch.sparse_decode`."""
    return SparseDecode.apply(acts, ids, W_O, triton_sparse)


def sparse_dot(x: Tensor, ids: Tensor, W: Tensor) -> Any:
    """Return h; see `dispatch.sparse_dot`."""
    return SparseDot.apply(x, ids, W, triton_sparse)


def sparse_topk_linear(
    x: Tensor, W: Tensor, b: Tensor, norm: Tensor, top_k: int, select: str
) -> Any:
    """Return acts and ids; see `dispatch.sparse_topk_linear`."""
    return SparseTopkLinear.apply(x, W, b, norm, top_k, select, triton_sparse)
