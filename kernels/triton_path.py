"""The Triton path: the operators of reference.py as fused kernels, for GPUs."""

from .triton_attention import sparse_topk_attention
from .triton_select import select_top_k
from .triton_sparse import sparse_decode

__all__ = ["select_top_k", "sparse_decode", "sparse_topk_attention"]
