"""Sparse top-k attention on the torch path: in blocks, without a dense z.

Legend: B batch, T query positions of a block, S key positions a block can see, H QK heads of a
chunk, G OV heads per QK head, K width of a QK head, N = n_ov_heads.

Forward, per (sequence, block of queries): P = softmax(scale q k^T) for a chunk of QK heads, z = P v
into a scratch of [T, N], then the row's top_k. Kept for the backward: q, k, v, acts, ids.

Backward, on the same blocks, with dz the sparse gradient of the selected z and D = act d_act summed
over the kept heads of a QK head (of gated acts, the gate is in both):

    dS = P (dz v^T - D)
    dq = scale dS k    dk = scale dS^T q    dv = P^T dz    d_sink = -sum_t P_sink D

(Dao et al. 2022, arXiv:2205.14135, appendix B.4.) Memory besides q, k, v and their gradients is one
block, so it grows with the sequence and not with its square. Blocks are worked on in buffers that
are used again, and q, k, v are read where they lie: fresh memory and copies cost as much as the
products. On a CPU every order is fixed: the same input gives the same bits. Half-precision inputs
are computed in fp32.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import Score
from .torch_select import Scratch, compute_dtype, select_top_k

QUERY_BLOCK = 128
SCORES_AT_ONCE = 1 << 22
"""Scores of a block: 16 MB in fp32, about what the last cache of a CPU holds."""


class _Block(NamedTuple):
    """One block of queries and the keys that they can see."""

    q0: int
    q1: int
    k0: int
    k1: int


def _blocks(seq: int, window: int | None) -> Iterator[_Block]:
    """Yield the query blocks of a sequence with their range of visible keys, the last one first.

    Without a window the last block sees every key, so what it adds to dk and dv can be written and
    need not be added.
    """
    for q0 in reversed(range(0, seq, QUERY_BLOCK)):
        q1 = min(q0 + QUERY_BLOCK, seq)
        yield _Block(q0, q1, 0 if window is None else max(0, q0 - window + 1), q1)


def _head_chunks(n_qk_heads: int, block: _Block) -> Iterator[slice]:
    """Yield runs of QK heads whose scores fit SCORES_AT_ONCE."""
    per_head = (block.q1 - block.q0) * (block.k1 - block.k0)
    step = max(1, SCORES_AT_ONCE // per_head)
    for h0 in range(0, n_qk_heads, step):
        yield slice(h0, min(h0 + step, n_qk_heads))


def _hide(scores: Tensor, block: _Block, window: int | None) -> None:
    """Set to -inf what a query of the block may not look at, in scores [H, T, S]."""
    q0, q1, k0, k1 = block
    own = scores[:, :, q0 - k0 :]  # the keys at the block's own positions, [H, T, T]
    own += torch.full_like(own[0], float("-inf")).triu_(1)
    if window is not None:
        q_pos = torch.arange(q0, q1, device=scores.device)[:, None]
        k_pos = torch.arange(k0, k1, device=scores.device)[None, :]
        scores.masked_fill_(q_pos - k_pos >= window, float("-inf"))


class _Pattern(NamedTuple):
    """The attention pattern of a block."""

    p: Tensor
    """P, [H, T, S]"""
    slope: Tensor | None
    """d(capped score)/d(score) with a softcap, alike"""
    p_sink: Tensor | None = None
    """Share of the sink, [H, T]"""


def _pattern(
    q: Tensor, k: Tensor, block: _Block, score: Score, sinks: Tensor | None, scratch: Scratch
) -> _Pattern:
    """Return P of queries [H, T, K] and keys [H, S, K], with sinks [H]."""
    scores = scratch.take("pattern", q.shape[0], q.shape[1], k.shape[1])
    factor = score.scale if score.softcap is None else score.scale / score.softcap
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=factor, out=scores)
    slope = None
    if score.softcap is not None:
        bent = scores.tanh_()
        slope = torch.mul(bent, bent, out=scratch.take("slope", *bent.shape)).neg_().add_(1)
        bent.mul_(score.softcap)
    _hide(scores, block, score.window)
    if sinks is None:
        return _Pattern(torch.softmax(scores, dim=-1, out=scores), slope)
    sinks = sinks[:, None]  # [H, 1]
    total = torch.logaddexp(scores.logsumexp(dim=-1), sinks)  # [H, T]
    return _Pattern(scores.sub_(total[:, :, None]).exp_(), slope, (sinks - total).exp_())


def _heads_first(x: Tensor, n_qk_heads: int) -> Tensor:
    """View one sequence [seq, heads * width] or [seq, heads, width] as [heads, seq, width]."""
    return x.unflatten(-1, (n_qk_heads, -1)).transpose(0, 1) if x.ndim == 2 else x.transpose(0, 1)


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
        batch, seq, n_qk_heads, _width = q.shape
        n_ov_heads = v.shape[-1]
        compute = compute_dtype(q.dtype)
        norm = w_o_norm.to(compute)
        acts = norm.new_empty(batch, seq, top_k)
        ids = q.new_empty(batch, seq, top_k, dtype=torch.int32)
        scratch = Scratch(norm)
        for b in range(batch):
            qh, kh, vh = (_heads_first(t[b].to(compute), n_qk_heads) for t in (q, k, v))
            for block in _blocks(seq, score.window):
                q0, q1, k0, k1 = block
                z = scratch.take("z", q1 - q0, n_qk_heads, n_ov_heads // n_qk_heads)  # [T, H, G]
                for h in _head_chunks(n_qk_heads, block):
                    sink = None if sinks is None else sinks[h].to(compute)
                    p = _pattern(qh[h, q0:q1], kh[h, k0:k1], block, score, sink, scratch).p
                    part = scratch.take("part", len(p), q1 - q0, z.shape[2])
                    z[:, h] = torch.bmm(p, vh[h, k0:k1], out=part).transpose(0, 1)
                rows = z.view(q1 - q0, n_ov_heads)
                if gate is not None:
                    rows.mul_(gate[b, q0:q1])
                kept = select_top_k(rows, norm, top_k=top_k, select=select, scratch=scratch)
                acts[b, q0:q1], ids[b, q0:q1] = kept
        # not rounded: an error of D does not average out in dq and dk
        ctx.save_for_backward(q, k, v, acts, ids, sinks, gate)
        ctx.score, ctx.select = score, select
        ctx.mark_non_differentiable(ids)
        return acts.to(v.dtype), ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, acts, ids, sinks, gate = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            fired = acts > 0 if ctx.select == "relu" else torch.ones_like(acts, dtype=torch.bool)
            d_acts = torch.where(fired, grads[0].to(acts.dtype), 0.0)
            dz = d_acts if gate is None else d_acts * gate.gather(-1, ids.long())
            kept = _Kept(ids.long(), dz, -acts * d_acts)
            dq, dk, dv, d_sinks = _attention_gradients(q, k, v, kept, ctx.score, sinks)
        return dq, dk, dv, None, None, None, None, d_sinks, None


class _Kept(NamedTuple):
    """What was kept of z, and its gradient, each [batch, seq, top_k]."""

    ids: Tensor
    dz: Tensor
    """Gradient of z before a gate"""
    minus_act_d_act: Tensor


def _attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, kept: _Kept, score: Score, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dq, dk, dv and the gradient of the sinks."""
    batch, seq, n_qk_heads, _width = q.shape
    n_ov_heads = v.shape[-1]
    group, compute = n_ov_heads // n_qk_heads, compute_dtype(q.dtype)
    dq, dk, dv = (torch.empty_like(t, dtype=compute) for t in (q, k, v))
    d_sinks = None if sinks is None else sinks.new_zeros(n_qk_heads, dtype=compute)
    wide = None if sinks is None else sinks.to(compute)
    dz_rows = kept.dz.new_zeros(min(seq, QUERY_BLOCK), n_ov_heads)
    scratch = Scratch(dz_rows)
    for b in range(batch):
        inputs = _Sequence(*(_heads_first(t[b].to(compute), n_qk_heads) for t in (q, k, v)))
        outputs = _Sequence(*(_heads_first(t[b], n_qk_heads) for t in (dq, dk, dv)))
        for block in _blocks(seq, score.window):
            rows, n_rows = slice(block.q0, block.q1), block.q1 - block.q0
            heads = kept.ids[b, rows]
            dz = dz_rows[:n_rows].scatter_(1, heads, kept.dz[b, rows])
            minus_d = scratch.take("minus_d", n_rows, n_qk_heads).zero_()
            minus_d.scatter_add_(1, heads // group, kept.minus_act_d_act[b, rows])
            sparse = _heads_first(dz, n_qk_heads), minus_d.t()[:, :, None]
            part = _block_gradients(block, inputs, outputs, *sparse, score, wide, scratch)
            if d_sinks is not None and part is not None:
                d_sinks += part
            dz.scatter_(1, heads, 0.0)
    if sinks is not None and d_sinks is not None:
        d_sinks = d_sinks.to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks


class _Sequence(NamedTuple):
    """Queries, keys and values of a sequence, or their gradients: [n_qk_heads, seq, width]."""

    q: Tensor
    k: Tensor
    v: Tensor


def _block_gradients(
    block: _Block,
    inputs: _Sequence,
    outputs: _Sequence,
    dz: Tensor,
    minus_d: Tensor,
    score: Score,
    sinks: Tensor | None,
    scratch: Scratch,
) -> Tensor | None:
    """Write dq of a block of queries, and write or add what it gives to dk and dv.

    Args:
        dz: gradient of z, [n_qk_heads, T, G].
        minus_d: -D of every query, [n_qk_heads, T, 1].
        sinks: [n_qk_heads].

    Returns:
        What it gives to the gradient of the sinks, [n_qk_heads].
    """
    d_sinks = None if sinks is None else torch.empty_like(sinks)
    q0, q1, k0, k1 = block
    (q, k, v), (dq, dk, dv) = inputs, outputs
    (n_qk_heads, seq, width), group = q.shape, v.shape[2]
    sees_all = k1 - k0 == seq
    put = Tensor.copy_ if sees_all else Tensor.add_
    if q1 == seq and not sees_all:
        dk.zero_()
        dv.zero_()
    for h in _head_chunks(n_qk_heads, block):
        q_h, k_h, dz_h = q[h, q0:q1], k[h, k0:k1], dz[h]
        sink = None if sinks is None else sinks[h]
        pattern, slope, p_sink = _pattern(q_h, k_h, block, score, sink, scratch)
        if d_sinks is not None and p_sink is not None:
            d_sinks[h] = (p_sink * minus_d[h, :, 0]).sum(dim=1)
        n_heads, n_queries, n_keys = pattern.shape
        part = scratch.take("dv", n_heads, n_keys, group)
        torch.bmm(pattern.transpose(1, 2), dz_h, out=part)
        put(dv[h, k0:k1], part)
        d_score = scratch.take("d_score", n_heads, n_queries, n_keys)
        torch.baddbmm(minus_d[h].expand_as(d_score), dz_h, v[h, k0:k1].transpose(1, 2), out=d_score)
        d_score.mul_(pattern)  # P (dP - D)
        if slope is not None:
            d_score.mul_(slope)
        part = torch.bmm(d_score, k_h, out=scratch.take("dq", n_heads, n_queries, width))
        torch.mul(part, score.scale, out=dq[h, q0:q1])
        part = scratch.take("dk", n_heads, n_keys, width)
        torch.bmm(d_score.transpose(1, 2), q_h, out=part)
        put(dk[h, k0:k1], part.mul_(score.scale))
    return d_sinks


sparse_topk_attention = _SparseTopkAttention.apply
