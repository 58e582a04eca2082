"""The torch path: the operators of reference.py with torch's own, for any device."""

from . import torch_sparse
from .sparse import Operators
from .torch_attention import sparse_topk_attention
from .torch_select import select_top_k

__all__ = [
    "select_top_k",
    "sparse_decode",
    "sparse_dot",
    "sparse_topk_attention",
    "sparse_topk_linear",
]

_operators = Operators(torch_sparse)
sparse_decode = _operators.sparse_decode
sparse_dot = _operators.sparse_dot
sparse_topk_linear = _operators.sparse_topk_linear
