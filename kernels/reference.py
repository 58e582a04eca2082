"""The definition of the four operators in plain torch: any device, any dtype, autograd.

    pattern[b, h, t, s] = softmax over s <= t of scale * <q[b, t, h], k[b, s, h]>
    z_pre[b, t, i]  = sum_s pattern[b, h, t, s] * v[b, s, i],   h = i // (n_ov_heads // n_qk_heads)
        with sinks, exp(sinks[h]) is in the denominator of the softmax too; with a gate, z_pre is
        multiplied by gate[b, t, i]
    acts, ids       = the top_k of z_pre by select(z_pre) * w_o_norm, ids ascending
    y_hat[b, t]     = sum_j acts[b, t, j] * W_O[ids[b, t, j]]

`sparse_topk_linear` takes x W^T + b for z_pre; `sparse_dot` is <x[b, t], W[ids[b, t, j]]>.

Every fast path is compared with this file. Nothing here is meant to be quick: whole patterns and
whole rows of z are held in memory.

Source: He et al. 2025, arXiv:2504.20938, section 3. Their head's q, k, v, z are ours; their W_O^h
is our row W_O[i].
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Score(NamedTuple):
    """The options by which a score is made of a dot product; see `Scored`."""

    scale: float
    softcap: float | None = None
    window: int | None = None

    @property
    def chunk(self) -> None:
        """Chunk; the operators take each chunk as a sequence of its own."""


class Scored(Protocol):
    """A `Score`, or the shape of a layer or of a Lorsa, which has the same options."""

    @property
    def scale(self) -> float:
        """Factor of the dot products, usually d_qk_head ** -0.5."""

    @property
    def softcap(self) -> float | None:
        """Cap: scores become softcap * tanh(scores / softcap) before the mask; None for none."""

    @property
    def window(self) -> int | None:
        """Window: a query sees itself and the window - 1 positions before it; None sees all."""

    @property
    def chunk(self) -> int | None:
        """Chunk: a query sees the keys of its own chunk of so many positions; None sees all."""


def attention_pattern(
    q: Tensor, k: Tensor, by: Scored, at: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return the causal softmax pattern of every QK head.

    Args:
        q: rotated queries, [batch, n_queries, n_qk_heads, d_qk_head].
        k: rotated keys, [batch, seq, n_qk_heads, d_qk_head].
        by: how scores are made of q and k.
        at: positions of the queries, [n_queries] or [batch, n_queries]; None is 0, 1, ...
        sinks: score of what each head attends to besides, which has no value, [n_qk_heads], or
            [batch, n_qk_heads].

    Returns:
        [batch, n_qk_heads, q_pos, k_pos], zero where a query may not look; rows sum to 1, or less
        with sinks.
    """
    scores = attention_scores(q, k, by, at)
    if sinks is None:
        return scores.softmax(dim=-1)
    extra = sinks.to(scores)[..., None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]


def attention_scores(q: Tensor, k: Tensor, by: Scored, at: Tensor | None = None) -> Tensor:
    """Return the scores of every QK head before the softmax; arguments as of `attention_pattern`.

    Returns:
        [batch, n_qk_heads, q_pos, k_pos], -inf where a query may not look.
    """
    scores = torch.einsum("bthk,bshk->bhts", q, k) * by.scale
    if by.softcap is not None:
        scores = by.softcap * torch.tanh(scores / by.softcap)
    position = torch.arange(k.shape[1], device=q.device)
    at = position[: q.shape[1]] if at is None else at
    unseen = hidden(at, position, by).unsqueeze(-3)  # [..., 1, q_pos, k_pos]
    return scores.masked_fill(unseen, float("-inf"))


def hidden(at: Tensor, position: Tensor, by: Scored) -> Tensor:
    """Return which keys queries may not look at, [..., q_pos, k_pos], bool.

    Args:
        at: positions of the queries, [..., n_queries].
        position: positions of the keys, [n_keys].
        by: how far queries see.
    """
    distance = at[..., None] - position
    unseen = distance < 0
    if by.window is not None:
        unseen |= distance >= by.window
    if by.chunk is not None:
        unseen |= at[..., None] // by.chunk != position // by.chunk
    return unseen


def lorsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by: Scored,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Attend causally with scalar value heads that share QK heads in groups.

    z_pre[b, t, i] = sum_s pattern[b, h, t, s] v[b, s, i],  h = i // (n_ov_heads // n_qk_heads)

    Args:
        q, k: rotated queries and keys, [batch, seq, n_qk_heads, d_qk_head].
        v: one scalar per OV head, [batch, seq, n_ov_heads].
        by: how scores are made of q and k.
        sinks: see `attention_pattern`.
        gate: factor of each OV head at each token, like v; None is 1.

    Returns:
        z before selection, [batch, seq, n_ov_heads].

    Source: He et al. 2025, arXiv:2504.20938; our v is their x W_V^h, our z their head activation.
    """
    batch, seq, n_qk_heads, _width = q.shape
    pattern = attention_pattern(q, k, by, sinks=sinks)
    grouped = v.reshape(batch, seq, n_qk_heads, -1)  # [batch, seq, n_qk_heads, group]
    z = torch.einsum("bhts,bshg->bthg", pattern, grouped)
    z = z.reshape(batch, seq, -1)  # [batch, seq, n_ov_heads]
    return z if gate is None else z * gate


def select_top_k(
    z_pre: Tensor, w_o_norm: Tensor, *, top_k: int, select: str
) -> tuple[Tensor, Tensor]:
    """Keep the top_k heads of each row by select(z_pre) * w_o_norm; ties go to the lowest id.

    Args:
        z_pre: [..., n_ov_heads].
        w_o_norm: ||W_O[i]||, [n_ov_heads]; takes part in the choice only, never in a gradient.
        top_k: how many heads a row keeps.
        select: "relu" keeps what is positive, "abs" keeps what is large.

    Returns:
        acts, [..., top_k]: z_pre at ids; with "relu" zero where a row has fewer positive heads.
        ids, [..., top_k]: ascending, int32.
    """
    magnitude = z_pre.relu() if select == "relu" else z_pre.abs()
    score = (magnitude * w_o_norm).detach()
    ranked = torch.sort(score, dim=-1, descending=True, stable=True).indices
    ids = ranked[..., :top_k].sort(dim=-1).values  # [..., top_k]
    acts = z_pre.gather(-1, ids)
    return (acts.relu() if select == "relu" else acts), ids.int()


def sparse_topk_attention(
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
    """Attend, then keep the top_k heads of every token; see `dispatch.sparse_topk_attention`."""
    z_pre = lorsa_attention(q, k, v, score, sinks, None if gate is None else gate.detach())
    return select_top_k(z_pre, w_o_norm, top_k=top_k, select=select)


def sparse_topk_linear(
    x: Tensor, W: Tensor, b: Tensor, norm: Tensor, top_k: int, select: str
) -> tuple[Tensor, Tensor]:
    """Keep the top_k of a linear map; see `dispatch.sparse_topk_linear`."""
    return select_top_k(x @ W.T + b, norm, top_k=top_k, select=select)


def sparse_dot(x: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """Return dot products with gathered rows; see `dispatch.sparse_dot`."""
    return (x @ W.T).gather(-1, ids.long())  # [batch, seq, slots]


def sparse_decode(acts: Tensor, ids: Tensor, W_O: Tensor) -> Tensor:
    """Sum the firing heads' output directions; see `dispatch.sparse_decode`."""
    batch, seq, _top_k = ids.shape
    n_ov_heads, _d_model = W_O.shape
    z = acts.new_zeros(batch, seq, n_ov_heads)
    z = z.scatter_add(-1, ids.long(), acts)  # [batch, seq, n_ov_heads]
    return z @ W_O  # [batch, seq, d_model]
