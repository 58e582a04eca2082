"""The Triton path: the operators of reference.py as fused kernels, for GPUs."""

from . import triton_sparse
from .sparse import Operators
from .triton_attention import sparse_topk_attention
from .triton_select import select_top_k

__all__ = [
    "select_top_k",
    "sparse_decode",
    "sparse_dot",
    "sparse_topk_attention",
    "sparse_topk_linear",
]

_operators = Operators(triton_sparse)
sparse_decode = _operators.sparse_decode
sparse_dot = _operators.sparse_dot
sparse_topk_linear = _operators.sparse_topk_linear
