"""Sparse top-k attention and sparse decode: tensors in, tensors out."""

from .dispatch import (
    BACKENDS,
    SELECTIONS,
    choose_path,
    sparse_decode,
    sparse_topk_attention,
)
from .reference import attention_pattern, lorsa_attention

__all__ = [
    "BACKENDS",
    "SELECTIONS",
    "attention_pattern",
    "choose_path",
    "lorsa_attention",
    "sparse_decode",
    "sparse_topk_attention",
]
