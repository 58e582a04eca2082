"""Sparse decode in Triton."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_kernels

DECODE_HEADS = 16
DECODE_CHANNELS = 256
DECODE_TILE = {"BLOCK_J": DECODE_HEADS, "BLOCK_D": DECODE_CHANNELS}
"""Tile of the decode kernels: kept heads (or tokens) by channels."""


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, ids: Tensor, W_O: Tensor) -> Tensor:
        acts, ids, W_O = acts.contiguous(), ids.contiguous(), W_O.contiguous()
        batch, seq, top_k = ids.shape
        d_model = W_O.shape[1]
        y_hat = acts.new_empty(batch, seq, d_model)
        triton_kernels.decode_kernel[batch * seq, triton.cdiv(d_model, DECODE_CHANNELS)](
            acts, ids, W_O, y_hat, top_k, d_model, **DECODE_TILE
        )
        ctx.save_for_backward(acts, ids, W_O)
        return y_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, ids, W_O = ctx.saved_tensors
        batch, seq, top_k = ids.shape
        n_ov_heads, d_model = W_O.shape
        dy = grads[0].contiguous()
        d_acts = dW_O = None
        if ctx.needs_input_grad[0]:
            # a slice of channels after the other: that much of W_O stays in the cache
            n_slices = triton.cdiv(d_model, DECODE_CHANNELS)
            parts = acts.new_empty(n_slices, *acts.shape, dtype=torch.float32)
            grid = (batch * seq, triton.cdiv(top_k, DECODE_HEADS), n_slices)
            triton_kernels.d_acts_kernel[grid](
                dy, ids, W_O, parts, batch * seq, top_k, d_model, **DECODE_TILE
            )
            d_acts = parts.sum(dim=0).to(acts.dtype)
        if ctx.needs_input_grad[2]:
            dW_O = torch.empty_like(W_O)
            heads, pairs = ids.flatten().sort(stable=True)
            edges = torch.arange(n_ov_heads + 1, device=ids.device, dtype=heads.dtype)
            starts = torch.searchsorted(heads, edges)
            triton_kernels.dw_kernel[n_ov_heads, triton.cdiv(d_model, DECODE_CHANNELS)](
                acts, dy, pairs, starts, dW_O, top_k, d_model, **DECODE_TILE
            )
        return d_acts, None, dW_O


sparse_decode = _SparseDecode.apply
