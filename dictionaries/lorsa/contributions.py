"""Contributions of source tokens to heads' activations: where heads read.

    z[t, i] = sum_s P[t, s] v[s, i]          P the pattern of i's QK head, v its values

P[t, s] v[s, i] is the contribution of source s; what a head reads is |P v|, for contributions of
both signs carry meaning. Sequences are worked through in blocks of queries, so that memory does
not grow with the square of their length.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.reference import Scored, attention_pattern
from .config import LorsaConfig

BLOCK_ELEMENTS = 8 << 20
"""Contributions, or entries of patterns, that are in memory at once."""
MOST_ROWS = 64
"""Queries of a block at most; sources after the last of them are left out."""


class Projected(NamedTuple):
    """The queries, keys and values of a Lorsa."""

    q: Tensor
    """Rotated queries, [batch, seq, n_qk_heads, d_qk_head]"""
    k: Tensor
    """Rotated keys, [batch, seq, n_qk_heads, d_qk_head]"""
    v: Tensor
    """Values, [batch, seq, n_ov_heads]"""
    sinks: Tensor | None
    """Score of what each QK head attends to besides, [n_qk_heads]"""
    gate: Tensor | None
    """Factors of z, [batch, seq, n_ov_heads]"""


class Block(NamedTuple):
    """The contributions to some queries' activations."""

    rows: slice
    """Positions of the queries"""
    parts: Tensor
    """P[t, s] v[s] of the heads in every slot, [batch, rows, slots, rows.stop]: later sources
    contribute nothing"""
    window: int | None
    """A query sees itself and the window - 1 positions before it; None sees all before"""


@torch.no_grad()
def blocks(config: LorsaConfig, projected: Projected, ids: Tensor) -> Iterator[Block]:
    """Yield the contributions to heads' activations, queries in order.

    Args:
        config: of the Lorsa whose heads they are.
        projected: its queries, keys and values of some sequences.
        ids: heads of every token, [batch, seq, slots].
    """
    c = config
    batch, seq, slots = ids.shape
    group = c.n_ov_heads // c.n_qk_heads
    v = projected.v.transpose(1, 2).contiguous()  # [batch, n_ov_heads, seq]
    which = torch.arange(batch, device=ids.device)[:, None, None]
    per_row = batch * max(slots, c.n_qk_heads) * seq
    step = max(1, min(MOST_ROWS, BLOCK_ELEMENTS // per_row))
    for start in range(0, seq, step):
        rows = slice(start, min(start + step, seq))
        heads = ids[:, rows].long()  # [batch, rows, slots]
        patterns = patterns_of(c, projected.q, projected.k, rows, projected.sinks).transpose(1, 2)
        query = torch.arange(heads.shape[1], device=ids.device)[None, :, None]
        parts = patterns[which, query, heads // group]
        parts.mul_(v[which, heads, : rows.stop])
        if projected.gate is not None:
            parts.mul_(projected.gate[:, rows].gather(-1, heads)[..., None])
        yield Block(rows, parts, c.window)


def patterns_of(
    by: Scored, q: Tensor, k: Tensor, rows: slice, sinks: Tensor | None = None
) -> Tensor:
    """Return the attention patterns of some queries, [batch, n_heads, rows, rows.stop].

    Args:
        by: how scores are made of q and k.
        q, k: queries and keys of whole sequences, [batch, seq, n_heads, width].
        rows: positions of the queries.
        sinks: see `attention_pattern`.
    """
    at = torch.arange(rows.start, rows.stop, device=q.device)
    return attention_pattern(q[:, rows], k[:, : rows.stop], by, at, sinks)
