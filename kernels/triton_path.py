"""The Triton path: the operators of reference.py as kernels whose backward costs what fired.

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

from . import torch_path, triton_kernels
from .reference import Score

SCRATCH_BYTES = 512 << 20
"""Bytes of z in the forward, and of dz in the backward, held at once; one sequence at least."""
SELECT_TILE = 8192
"""Entries of a row that one program ranks."""
ROWS_TILE = 2048
"""Entries that one program ranks at most where rows are shorter: several rows of them."""
SELECT_MERGED = 16384
"""Candidates of a row that the second round ranks at most."""
ROW_SUMS_BLOCK = 64
DECODE_HEADS = 16
DECODE_CHANNELS = 256
DECODE_TILE = {"BLOCK_J": DECODE_HEADS, "BLOCK_D": DECODE_CHANNELS}
"""Tile of the decode kernels: kept heads (or tokens) by channels."""


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


def select_top_k(
    z_pre: Tensor, w_o_norm: Tensor, *, top_k: int, select: str
) -> tuple[Tensor, Tensor]:
    """Do what `reference.select_top_k` does, for z_pre [rows, n_ov_heads] in fp32, read once.

    Long rows are ranked in tiles, then the tiles' candidates among each other. Where those are too
    many, which takes an unusually large top_k, torch ranks.
    """
    n_entries = z_pre.shape[1]
    tile = min(SELECT_TILE, triton.next_power_of_2(n_entries))
    n_tiles = triton.cdiv(n_entries, tile)
    kept = min(top_k, tile)
    if n_tiles > 1 and n_tiles * kept > SELECT_MERGED:
        return torch_path.select_top_k(z_pre, w_o_norm, top_k=top_k, select=select)
    acts, ids = _select(z_pre, None, w_o_norm, top_k=kept, select=select, tile=tile)
    if n_tiles > 1:
        width = triton.next_power_of_2(acts.shape[1])
        acts, ids = _select(acts, ids, w_o_norm, top_k=top_k, select=select, tile=width)
    return acts, ids


def _select(
    z: Tensor, ids: Tensor | None, norm: Tensor, *, top_k: int, select: str, tile: int
) -> tuple[Tensor, Tensor]:
    """Keep the top_k of every tile of every row, [rows, n_tiles * top_k] each."""
    n_rows, n_entries = z.shape
    n_tiles = triton.cdiv(n_entries, tile)
    kept_acts = z.new_zeros(n_rows, n_tiles * top_k)
    kept_ids = torch.full_like(kept_acts, -1, dtype=torch.int32)
    rows = max(1, ROWS_TILE // tile)
    triton_kernels.select_kernel[triton.cdiv(n_rows, rows), n_tiles](
        z,
        ids,
        norm,
        kept_acts,
        kept_ids,
        n_rows,
        n_entries,
        n_tiles,
        top_k,
        SELECT=select,
        ROWS=rows,
        BLOCK=tile,
        num_warps=8 if tile >= 4096 else 4,
    )
    return kept_acts, kept_ids


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
    ) -> tuple[Tensor, Tensor]:
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
                q[part], k[part], v[part], scratch, lse[part], seq, n_qk_heads,
                *score, **settings,
            )  # fmt: skip
            kept = select_top_k(
                scratch[:n_seq].view(n_seq * seq, n_ov_heads), norm, top_k=top_k, select=select
            )
            acts[part] = kept[0].view(n_seq, seq, top_k)
            ids[part] = kept[1].view(n_seq, seq, top_k)
        # not rounded: an error of D does not average out in dq and dk
        ctx.save_for_backward(q, k, v, lse, acts, ids)
        ctx.score, ctx.select = score, select
        ctx.mark_non_differentiable(ids)
        return acts.to(v.dtype), ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, acts, ids = ctx.saved_tensors
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
        return dq, dk, dv, None, None, None, None


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


sparse_topk_attention = _SparseTopkAttention.apply
sparse_decode = _SparseDecode.apply
