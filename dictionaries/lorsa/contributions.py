"""Contributions of source tokens to heads' activations: where heads read.

    z[t, i] = sum_s P[t, s] v[s, i]          P the pattern of i's QK head, v its values

P[t, s] v[s, i] is the contribution of source s; what a head reads is |P v|, for contributions of
both signs carry meaning. Sequences are worked through in blocks of queries, so that memory does
not grow with the square of their length.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.reference import attention_pattern
from ...language.geometry import AttentionGeometry
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


class LorsaLike(Protocol):
    """The parts of a Lorsa that are used here: its module imports this one."""

    @property
    def config(self) -> LorsaConfig:
        """Return the shape."""

    @property
    def W_V(self) -> Tensor:
        """Return the directions that values read, [n_ov_heads, d_model]."""

    @property
    def b_V(self) -> Tensor:
        """Return the biases of values, [n_ov_heads]."""

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated queries and keys, [batch, seq, n_qk_heads, d_qk_head]."""

    def project(self, x: Tensor) -> Projected:
        """Return queries, keys and values."""


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
def blocks(lorsa: LorsaLike, projected: Projected, ids: Tensor) -> Iterator[Block]:
    """Yield the contributions to heads' activations, queries in order.

    Args:
        lorsa: whose heads they are.
        projected: its queries, keys and values of some sequences.
        ids: heads of every token, [batch, seq, slots].
    """
    c = lorsa.config
    batch, seq, slots = ids.shape
    group = c.n_ov_heads // c.n_qk_heads
    v = projected.v.transpose(1, 2).contiguous()  # [batch, n_ov_heads, seq]
    which = torch.arange(batch, device=ids.device)[:, None, None]
    per_row = batch * max(slots, c.n_qk_heads) * seq
    step = max(1, min(MOST_ROWS, BLOCK_ELEMENTS // per_row))
    for start in range(0, seq, step):
        rows = slice(start, min(start + step, seq))
        heads = ids[:, rows].long()  # [batch, rows, slots]
        patterns = patterns_of(c, projected.q, projected.k, rows).transpose(1, 2)
        query = torch.arange(heads.shape[1], device=ids.device)[None, :, None]
        parts = patterns[which, query, heads // group]
        yield Block(rows, parts.mul_(v[which, heads, : rows.stop]), c.window)


def patterns_of(
    shape: LorsaConfig | AttentionGeometry, q: Tensor, k: Tensor, rows: slice
) -> Tensor:
    """Return the attention patterns of some queries, [batch, n_heads, rows, rows.stop].

    Args:
        shape: how scores are made of q and k.
        q, k: queries and keys of whole sequences, [batch, seq, n_heads, width].
        rows: positions of the queries.
    """
    return attention_pattern(
        q[:, rows],
        k[:, : rows.stop],
        scale=shape.scale,
        window=shape.window,
        softcap=shape.softcap,
        at=torch.arange(rows.start, rows.stop, device=q.device),
    )


@torch.no_grad()
def contributions_at(
    lorsa: LorsaLike, x: Tensor, which: Tensor, positions: Tensor, heads: Tensor
) -> Tensor:
    """Return the contributions to single activations.

    Args:
        lorsa: on x's device.
        x: the layer's input, [batch, seq, d_model].
        which, positions, heads: sequence in the batch, position and OV head, int64, [n].

    Returns:
        P[t, s] v[s], [n, seq].
    """
    c = lorsa.config
    q, k = lorsa.queries_keys(x)
    qk = heads // (c.n_ov_heads // c.n_qk_heads)
    parts = torch.empty(len(heads), x.shape[1], device=x.device)
    for b in which.unique().tolist():
        of_sequence = (which == b).nonzero().squeeze(1)
        for mine in of_sequence.split(max(1, BLOCK_ELEMENTS // (x.shape[1] * c.d_qk_head))):
            at = positions[mine]
            pattern = attention_pattern(
                q[b, at, qk[mine]][:, None, None],
                k[b].transpose(0, 1)[qk[mine]][:, :, None],
                scale=c.scale,
                window=c.window,
                softcap=c.softcap,
                at=at[:, None],
            )[:, 0, 0]  # [n, seq]
            values = F.linear(x[b], lorsa.W_V[heads[mine]], lorsa.b_V[heads[mine]])
            parts[mine] = pattern * values.T
    return parts


def contributions(lorsa: LorsaLike, x: Tensor, ids: Tensor) -> Tensor:
    """Return what each source adds to the activations of heads; see `Lorsa.contributions`."""
    batch, seq, _d_model = x.shape
    if ids.ndim == 0 or ids.shape[:-1] not in ((), (batch, seq)):
        raise ValueError(f"ids is {list(ids.shape)}; it must be [{batch}, {seq}, slots] or [slots]")
    heads = ids.expand(batch, seq, -1)  # [batch, seq, slots]
    found = blocks(lorsa, lorsa.project(x), heads)
    return torch.cat([F.pad(b.parts, (0, seq - b.rows.stop)) for b in found], dim=1)
