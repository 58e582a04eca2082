"""Sparse top-k attention and sparse decode: tensors in, tensors out."""

from .dispatch import BACKENDS, SELECTIONS, sparse_decode, sparse_topk_attention
from .reference import attention_pattern, lorsa_attention

__all__ = [
    "BACKENDS",
    "SELECTIONS",
    "attention_pattern",
    "lorsa_attention",
    "sparse_decode",
    "sparse_topk_attention",
]
