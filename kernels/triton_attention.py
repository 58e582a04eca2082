"""Sparse top-k attention in Triton: kernels whose backward costs what fired.

Legend: B batch, S positions, H QK heads, G OV heads per QK head, K width of a QK head, N = H G,
top_k heads kept per token. A *firing row* is a (sequence, QK head, position) at which some OV head
of that QK head fired; only these have a gradient.

Forward, a few sequences at a time:
    attend   online softmax per (block of positions, QK head); the G values are the value tile;
             z goes to a scratch, the row's logsumexp is kept
    select   exact top_k of each row of the scratch, which is read once

Backward, a few sequences at a time:
    rows     firing rows sorted by (sequence, QK head, position); dz scattered into a scratch
    dq       tiles of gathered firing rows against all keys they see
    dk, dv   a block of keys against all firing rows that see it

Nothing is added atomically and every order is fixed, so the same input gives the same bits.
kernels/README.md derives the formulas and counts bytes and operations.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_kernels
from .reference import Score
from .triton_select import select_top_k

SCRATCH_BYTES = 512 << 20
"""Bytes of z in the forward, and of dz in the backward, held at once; one sequence at least."""
ROW_SUMS_BLOCK = 64


class Tiles(NamedTuple):
    """Tile shape of an attention kernel."""

    rows: int
    """Positions; firing rows in a backward kernel"""
    keys: int
    warps: int


HALF, SINGLE = 2, 4
TILES = {
    (HALF, 64): {"attend": (128, 64, 4), "dq": (128, 64, 8), "dkv": (128, 64, 8)},
    (HALF, 128): {"attend": (128, 64, 8), "dq": (128, 64, 8), "dkv": (64, 32, 4)},
    (HALF, 256): {"attend": (128, 32, 8), "dq": (64, 32, 8), "dkv": (16, 64, 8)},
    (SINGLE, 64): {"attend": (64, 32, 4), "dq": (64, 32, 4), "dkv": (16, 64, 8)},
    (SINGLE, 128): {"attend": (32, 32, 8), "dq": (32, 32, 8), "dkv": (16, 64, 8)},
    (SINGLE, 256): {"attend": (32, 16, 8), "dq": (16, 16, 8), "dkv": (16, 32, 8)},
}
"""Tiles by bytes of an element and the larger of d_qk_head and the OV heads of a QK head. Compiled
for compute capability 9.0, they fit its shared memory and spill the fewest registers."""


def tiles(kernel: str, dtype: torch.dtype, widest: int, n_rows: float) -> Tiles:
    """Return the tile shape of a kernel.

    Args:
        kernel: "attend", "dq" or "dkv".
        dtype: of q, k and v.
        widest: the larger of d_qk_head and the OV heads of a QK head.
        n_rows: about how many rows a QK head of a sequence has to work on.
    """
    width = next((w for w in (64, 128) if widest <= w), 256)
    rows, keys, warps = TILES[dtype.itemsize, width][kernel]
    enough = max(16, int(triton.next_power_of_2(math.ceil(n_rows))))
    return Tiles(rows, keys, warps) if enough >= rows else Tiles(enough, keys, 4)


def _dot_width(width: int) -> int:
    """Return the tile width for so many channels: a power of two that a dot accepts."""
    return max(16, int(triton.next_power_of_2(width)))


def _chunks(batch: int, sequence_elements: int) -> list[slice]:
    """Cut a batch into runs of sequences whose fp32 scratch fits SCRATCH_BYTES."""
    step = max(1, SCRATCH_BYTES // (4 * sequence_elements))
    return [slice(b, min(b + step, batch)) for b in range(0, batch, step)]


def constants(
    kernel: str, dtype: torch.dtype, width: int, group: int, n_rows: float
) -> dict[str, Any]:
    """Return the constants of an attention kernel; `width` is d_qk_head, the rest as in `tiles`."""
    rows, keys, warps = tiles(kernel, dtype, max(width, group), n_rows)
    return {
        "WIDTH": width,
        "GROUP": group,
        "BLOCK_K": _dot_width(width),
        "BLOCK_G": _dot_width(group),
        "BLOCK_T": rows,
        "BLOCK_S": keys,
        "PRECISION": "tf32x3" if dtype == torch.float32 else None,
        "num_warps": warps,
    }


def _firing_rows(
    fired: Tensor, ids: Tensor, *, n_qk_heads: int, group: int, keys: int, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the firing rows of a few sequences, sorted by (sequence, QK head, position).

    Args:
        fired: which kept heads have a gradient, bool, [sequences, seq, top_k].
        ids: the kept heads, ascending, [sequences, seq, top_k].
        keys: size of a block of keys.

    Returns:
        pairs: first of every row's kept heads, as an index into acts; int64.
        starts: first row at or after each block of keys, [n_heads, n_blocks + 1]; then the end.
        ends: end of the rows that see each block, alike.
    """
    n_seq, seq, _top_k = ids.shape
    n_heads = n_seq * n_qk_heads
    qk_head = ids.long() // group
    order = torch.arange(n_seq * seq, device=ids.device).view(n_seq, seq, 1)
    b, t = order // seq, order % seq
    key = (b * n_qk_heads + qk_head) * seq + t  # a row's place in the order
    # the first kept head of a row stands for it; gradients of the others are in dz
    first = torch.ones_like(fired)
    first[..., 1:] = qk_head[..., 1:] != qk_head[..., :-1]
    alive = _any_in_run(fired, first)
    key = torch.where(first & alive, key, n_heads * seq).flatten()
    key, pairs = key.sort(stable=True)
    n_blocks = triton.cdiv(seq, keys)
    edge = torch.arange(n_blocks + 1, device=ids.device) * keys
    base = torch.arange(n_heads, device=ids.device)[:, None] * seq
    starts = torch.searchsorted(key, base + edge.clamp(max=seq))
    last = seq if window is None else (edge + keys + window - 1).clamp(max=seq)
    ends = torch.searchsorted(key, (base + last).expand(n_heads, n_blocks + 1).contiguous())
    return pairs, starts, ends


def _any_in_run(fired: Tensor, first: Tensor) -> Tensor:
    """Return, at the first kept head of a row, whether any of the row's fired."""
    run = first.int().cumsum(dim=-1) - 1
    count = torch.zeros_like(run).scatter_add_(-1, run, fired.long())
    return count.gather(-1, run) > 0


class _SparseTopkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w_o_norm: Tensor,
        top_k: int,
        select: str,
        score: Score,
        sinks: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        wide = None if sinks is None else sinks.float().contiguous()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        batch, seq, n_qk_heads, width = q.shape
        n_ov_heads = v.shape[-1]
        norm = w_o_norm.float().contiguous()
        acts = torch.empty(batch, seq, top_k, dtype=torch.float32, device=q.device)
        ids = torch.empty(batch, seq, top_k, dtype=torch.int32, device=q.device)
        lse = torch.empty(batch, n_qk_heads, seq, dtype=torch.float32, device=q.device)
        settings = constants("attend", q.dtype, width, n_ov_heads // n_qk_heads, seq)
        chunks = _chunks(batch, seq * n_ov_heads)
        n_most = chunks[0].stop
        scratch = torch.empty(n_most, seq, n_ov_heads, dtype=torch.float32, device=q.device)
        for part in chunks:
            n_seq = part.stop - part.start
            triton_kernels.attend_kernel[n_seq * n_qk_heads, triton.cdiv(seq, settings["BLOCK_T"])](
                q[part], k[part], v[part], wide, scratch, lse[part], seq, n_qk_heads,
                *score, **settings,
            )  # fmt: skip
            if gate is not None:
                scratch[:n_seq].mul_(gate[part])
            kept = select_top_k(
                scratch[:n_seq].view(n_seq * seq, n_ov_heads), norm, top_k=top_k, select=select
            )
            acts[part] = kept[0].view(n_seq, seq, top_k)
            ids[part] = kept[1].view(n_seq, seq, top_k)
        # not rounded: an error of D does not average out in dq and dk
        ctx.save_for_backward(q, k, v, lse, acts, ids, sinks, gate)
        ctx.score, ctx.select = score, select
        ctx.mark_non_differentiable(ids)
        return acts.to(v.dtype), ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, acts, ids, sinks, gate = ctx.saved_tensors
        score: Score = ctx.score
        batch, seq, n_qk_heads, width = q.shape
        n_ov_heads, top_k = v.shape[-1], ids.shape[-1]
        group = n_ov_heads // n_qk_heads
        fired = acts > 0 if ctx.select == "relu" else torch.ones_like(acts, dtype=torch.bool)
        d_acts = torch.where(fired, grads[0].float(), 0.0).contiguous()
        fired = d_acts != 0  # not the candidates that an activation turned down
        sums = torch.empty_like(d_acts)
        block = min(ROW_SUMS_BLOCK, int(triton.next_power_of_2(top_k)))
        triton_kernels.row_sums_kernel[batch * seq, triton.cdiv(top_k, block)](
            acts,
            d_acts,
            ids,
            sums,
            top_k,
            GROUP=group,
            BLOCK=block,
            BLOCK_J=16,
        )
        d_sinks = None if sinks is None else _sink_gradient(sinks, lse, ids, sums, group)
        if gate is not None:
            d_acts = d_acts * gate.gather(-1, ids.long())
        n_rows = seq * min(1.0, top_k / n_qk_heads)
        dq_settings, dkv_settings = (
            constants(kernel, q.dtype, width, group, n_rows) for kernel in ("dq", "dkv")
        )
        rows_tile, keys_tile = dq_settings["BLOCK_T"], dkv_settings["BLOCK_S"]
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        chunks = _chunks(batch, seq * n_ov_heads)
        scratch = torch.zeros(chunks[0].stop, seq, n_ov_heads, dtype=torch.float32, device=q.device)
        for part in chunks:
            n_seq = part.stop - part.start
            heads = ids[part].long()
            dz = scratch[:n_seq].scatter_(-1, heads, d_acts[part])
            pairs, starts, ends = _firing_rows(
                fired[part],
                ids[part],
                n_qk_heads=n_qk_heads,
                group=group,
                keys=keys_tile,
                window=score.window,
            )
            inputs = (q[part], k[part], v[part], dz, lse[part], sums[part], pairs)
            sizes = (seq, n_qk_heads, top_k, starts.shape[1], *score)
            n_heads = n_seq * n_qk_heads
            triton_kernels.dq_kernel[n_heads, triton.cdiv(seq, rows_tile)](
                *inputs, starts, dq[part], *sizes, **dq_settings
            )
            triton_kernels.dkv_kernel[n_heads, triton.cdiv(seq, keys_tile)](
                *inputs, starts, ends, dk[part], dv[part], *sizes, **dkv_settings
            )
            dz.scatter_(-1, heads, 0.0)
        return dq, dk, dv, None, None, None, None, d_sinks, None


def _sink_gradient(sinks: Tensor, lse: Tensor, ids: Tensor, sums: Tensor, group: int) -> Tensor:
    """Return the gradient of the sinks, [n_qk_heads], of D at every kept head, like ids."""
    d = lse.new_zeros(*ids.shape[:2], len(sinks))
    d.scatter_(-1, ids.long() // group, sums)  # the kept heads of a QK head have the same D
    share = (sinks.float()[:, None] - lse).exp()  # [batch, n_qk_heads, seq]
    return -(share * d.transpose(1, 2)).sum(dim=(0, 2)).to(sinks.dtype)


sparse_topk_attention = _SparseTopkAttention.apply
