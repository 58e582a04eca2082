"""The torch path: the operators of reference.py, in blocks, without a dense z and its gradients.

Legend: B batch, T query positions of a block, S key positions a block can see, H QK heads of a
chunk, G OV heads per QK head, K width of a QK head, N = n_ov_heads.

Forward, per (sequence, block of queries): P = softmax(scale q k^T) for a chunk of QK heads, z = P v
into a scratch of [T, N], then the row's top_k. Kept for the backward: q, k, v, acts, ids.

Backward, on the same blocks, with dz the sparse gradient of the selected z:

    dP = dz v^T        dS = P dP - P rowsum(P dP)
    dq = scale dS k    dk = scale dS^T q    dv = P^T dz

(Dao et al. 2022, arXiv:2205.14135, appendix B.4.) Memory besides q, k, v and their gradients is a
copy of one sequence of them and one block, so it grows with the sequence and not with its square.
No atomics and a fixed order: the same input gives the same bits. Half-precision inputs are computed
in fp32.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 128
BLOCK_ELEMENTS = 1 << 22
"""Scores held at once: 16 MB in fp32, about what the last cache of a CPU holds."""


class _Score(NamedTuple):
    """How a score is made of a dot product."""

    scale: float
    window: int | None
    softcap: float | None


class _Block(NamedTuple):
    """One block of queries and the keys that they can see."""

    q0: int
    q1: int
    k0: int
    k1: int


def _blocks(seq: int, window: int | None) -> Iterator[_Block]:
    """Yield the query blocks of a sequence with their range of visible keys."""
    for q0 in range(0, seq, QUERY_BLOCK):
        q1 = min(q0 + QUERY_BLOCK, seq)
        yield _Block(q0, q1, 0 if window is None else max(0, q0 - window + 1), q1)


def _head_chunks(n_qk_heads: int, block: _Block) -> Iterator[slice]:
    """Yield runs of QK heads whose scores fit BLOCK_ELEMENTS."""
    per_head = (block.q1 - block.q0) * (block.k1 - block.k0)
    step = max(1, BLOCK_ELEMENTS // per_head)
    for h0 in range(0, n_qk_heads, step):
        yield slice(h0, min(h0 + step, n_qk_heads))


def _hidden(block: _Block, window: int | None, device: torch.device) -> Tensor:
    """Return the mask of keys that a query of the block may not see, [T, S]."""
    q_pos = torch.arange(block.q0, block.q1, device=device)[:, None]
    k_pos = torch.arange(block.k0, block.k1, device=device)[None, :]
    hidden = k_pos > q_pos
    if window is not None:
        hidden |= q_pos - k_pos >= window
    return hidden


def _pattern(q: Tensor, k: Tensor, hidden: Tensor, score: _Score) -> tuple[Tensor, Tensor | None]:
    """Return P [H, T, S] and, with a softcap, the slope d(capped score)/d(score) alike."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(score.scale)  # [H, T, S]
    slope = None
    if score.softcap is not None:
        bent = scores.div_(score.softcap).tanh_()
        slope = 1 - bent.square()
        scores = bent * score.softcap
    return scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1), slope


def select_top_k(
    z_pre: Tensor, w_o_norm: Tensor, *, top_k: int, select: str
) -> tuple[Tensor, Tensor]:
    """Do as `reference.select_top_k`, with a partial sort of each row.

    torch.topk breaks ties as it likes; the rows where that could matter (another entry equals the
    smallest kept one) are ranked again by a stable sort.
    """
    n_ov_heads = z_pre.shape[-1]
    score = (z_pre.relu() if select == "relu" else z_pre.abs()).mul_(w_o_norm)
    kept = score.topk(top_k, dim=-1, sorted=False)
    ids = kept.indices
    if top_k < n_ov_heads:
        smallest = kept.values.amin(dim=-1, keepdim=True)
        tied = (score >= smallest).sum(dim=-1) > top_k
        if tied.any():
            ranked = torch.sort(score[tied], dim=-1, descending=True, stable=True).indices
            ids[tied] = ranked[..., :top_k]
    ids = ids.sort(dim=-1).values
    acts = z_pre.gather(-1, ids)
    return (acts.relu_() if select == "relu" else acts), ids.int()


def _heads_first(x: Tensor, n_qk_heads: int) -> Tensor:
    """Turn one sequence [seq, heads * width] or [seq, heads, width] to [heads, seq, width]."""
    seq = x.shape[0]
    return x.reshape(seq, n_qk_heads, -1).transpose(0, 1).contiguous()


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        score: _Score,
    ) -> tuple[Tensor, Tensor]:
        batch, seq, n_qk_heads, _width = q.shape
        n_ov_heads = v.shape[-1]
        compute = _compute_dtype(q.dtype)
        norm = w_o_norm.to(compute)
        acts = q.new_empty(batch, seq, top_k, dtype=v.dtype)
        ids = q.new_empty(batch, seq, top_k, dtype=torch.int32)
        for b in range(batch):
            qh, kh, vh = (_heads_first(t[b].to(compute), n_qk_heads) for t in (q, k, v))
            for block in _blocks(seq, score.window):
                q0, q1, k0, k1 = block
                hidden = _hidden(block, score.window, q.device)
                z = qh.new_empty(q1 - q0, n_qk_heads, n_ov_heads // n_qk_heads)  # [T, H, G]
                for h in _head_chunks(n_qk_heads, block):
                    pattern, _ = _pattern(qh[h, q0:q1], kh[h, k0:k1], hidden, score)
                    z[:, h] = torch.bmm(pattern, vh[h, k0:k1]).transpose(0, 1)
                acts[b, q0:q1], ids[b, q0:q1] = select_top_k(
                    z.view(q1 - q0, n_ov_heads), norm, top_k=top_k, select=select
                )
        ctx.save_for_backward(q, k, v, acts, ids)
        ctx.score, ctx.select = score, select
        ctx.mark_non_differentiable(ids)
        return acts, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, acts, ids = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            d_acts = grads[0] * (acts > 0) if ctx.select == "relu" else grads[0]
            dq, dk, dv = _attention_gradients(q, k, v, ids, d_acts, ctx.score)
        return dq, dk, dv, None, None, None, None


def _attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, d_acts: Tensor, score: _Score
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, given the gradient of the kept z, [batch, seq, top_k]."""
    batch, seq, n_qk_heads, _width = q.shape
    n_ov_heads = v.shape[-1]
    compute = _compute_dtype(q.dtype)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for b in range(batch):
        qh, kh, vh = (_heads_first(t[b].to(compute), n_qk_heads) for t in (q, k, v))
        dqh, dkh, dvh = torch.empty_like(qh), torch.zeros_like(kh), torch.zeros_like(vh)
        fired = ids[b].long()  # [seq, top_k]
        d_fired = d_acts[b].to(compute)
        for block in _blocks(seq, score.window):
            q0, q1, k0, k1 = block
            hidden = _hidden(block, score.window, q.device)
            dz = qh.new_zeros(q1 - q0, n_ov_heads)
            dz.scatter_(1, fired[q0:q1], d_fired[q0:q1])
            dz = _heads_first(dz, n_qk_heads)  # [n_qk_heads, T, G]
            for h in _head_chunks(n_qk_heads, block):
                q_h, k_h = qh[h, q0:q1], kh[h, k0:k1]
                pattern, slope = _pattern(q_h, k_h, hidden, score)
                dvh[h, k0:k1].baddbmm_(pattern.transpose(1, 2), dz[h])
                d_score = torch.bmm(dz[h], vh[h, k0:k1].transpose(1, 2))  # [H, T, S]
                d_score.mul_(pattern)  # P dP
                total = d_score.sum(dim=-1, keepdim=True)  # D
                d_score.addcmul_(pattern, total, value=-1).mul_(score.scale)
                if slope is not None:
                    d_score.mul_(slope)
                torch.bmm(d_score, k_h, out=dqh[h, q0:q1])
                dkh[h, k0:k1].baddbmm_(d_score.transpose(1, 2), q_h)
        dq[b] = dqh.transpose(0, 1)
        dk[b] = dkh.transpose(0, 1)
        dv[b] = dvh.transpose(0, 1).reshape(seq, n_ov_heads)
    return dq, dk, dv


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, ids: Tensor, W_O: Tensor) -> Tensor:
        batch, seq, top_k = ids.shape
        compute = _compute_dtype(acts.dtype)
        ctx.save_for_backward(acts, ids, W_O)
        y_hat = F.embedding_bag(
            ids.reshape(-1, top_k),
            W_O.to(compute),
            per_sample_weights=acts.reshape(-1, top_k).to(compute),
            mode="sum",
        )
        return y_hat.view(batch, seq, W_O.shape[1]).to(acts.dtype)  # [batch, seq, d_model]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, ids, W_O = ctx.saved_tensors
        top_k = ids.shape[-1]
        compute = _compute_dtype(acts.dtype)
        dy = grads[0].reshape(-1, W_O.shape[1]).to(compute)  # [tokens, d_model]
        flat_ids = ids.reshape(-1, top_k)
        d_acts = dW_O = None
        if ctx.needs_input_grad[0]:
            d_acts = _gathered_dot(flat_ids, W_O.to(compute), dy).view_as(acts).to(acts.dtype)
        if ctx.needs_input_grad[2]:
            flat_acts = acts.reshape(-1, top_k).to(compute)
            dW_O = _segmented_sum(flat_ids, flat_acts, dy, len(W_O)).to(W_O.dtype)
        return d_acts, None, dW_O


def _gathered_dot(ids: Tensor, W_O: Tensor, dy: Tensor) -> Tensor:
    """Return <dy[t], W_O[ids[t, j]]>, [tokens, top_k]: embedding_bag's gradient of its weights."""
    with torch.enable_grad():
        weights = torch.zeros(ids.shape, dtype=dy.dtype, device=dy.device, requires_grad=True)
        bag = F.embedding_bag(ids, W_O.detach(), per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(bag, weights, dy)[0]


def _segmented_sum(ids: Tensor, acts: Tensor, dy: Tensor, n_ov_heads: int) -> Tensor:
    """Return sum over t, j with ids[t, j] = i of acts[t, j] dy[t], [n_ov_heads, d_model].

    The transposed decode: firing pairs sorted by head, one bag per head, tokens as the table.
    """
    _tokens, top_k = ids.shape
    heads = ids.reshape(-1)
    by_head = heads.argsort(stable=True)  # [tokens * top_k]
    count = heads.bincount(minlength=n_ov_heads)
    return F.embedding_bag(
        by_head // top_k,
        dy,
        count.cumsum(0) - count,
        per_sample_weights=acts.reshape(-1)[by_head],
        mode="sum",
    )


def sparse_topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o_norm: Tensor,
    *,
    top_k: int,
    scale: float,
    select: str = "relu",
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend, then keep the top_k heads of every token; see `kernels.sparse_topk_attention`."""
    score = _Score(scale, window, softcap)
    acts, ids = _SparseTopkAttention.apply(q, k, v, w_o_norm.detach(), top_k, select, score)
    return acts, ids


def sparse_decode(acts: Tensor, ids: Tensor, W_O: Tensor) -> Tensor:
    """Sum the firing heads' output directions; see `kernels.sparse_decode`."""
    y_hat: Tensor = _SparseDecode.apply(acts, ids, W_O)
    return y_hat
