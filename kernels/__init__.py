"""Sparse top-k attention and sparse decode: tensors in, tensors out."""
