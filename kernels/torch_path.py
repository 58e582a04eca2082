"""The torch path: the operators of reference.py with torch's own, for any device."""

from .torch_attention import sparse_topk_attention
from .torch_select import select_top_k
from .torch_sparse import sparse_decode

__all__ = ["select_top_k", "sparse_decode", "sparse_topk_attention"]
