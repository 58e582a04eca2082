"""From where heads read: the parts that their activations are sums of.

    z[t, i] = sum_s P[t, s] v[s, i]          P the pattern of i's QK head, v its values

P[t, s] v[s, i] is the contribution of source s; what a head reads is |P v|, for contributions of
both signs carry meaning. Sequences are worked through in blocks of queries, so that memory does
not grow with the square of their length.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import attention_pattern
from ..model import Lorsa

BLOCK_ELEMENTS = 16 << 20
"""Contributions that are in memory at once."""


class Block(NamedTuple):
    """The contributions to some queries' activations."""

    rows: slice
    """The queries' positions"""
    parts: Tensor
    """P[t, s] v[s] of the heads in every slot, [batch, rows, slots, seq]"""


class Sources:
    """The queries, keys and values of a Lorsa on some sequences."""

    @torch.no_grad()
    def __init__(self, lorsa: Lorsa, x: Tensor) -> None:
        """Compute them.

        Args:
            lorsa: on x's device.
            x: the layer's input, [batch, seq, d_model].
        """
        c = self._config = lorsa.config
        x = x.to(lorsa.W_V.dtype)
        self._group = c.n_ov_heads // c.n_qk_heads
        self._q, self._k = lorsa.queries_keys(x)
        self._v = lorsa.values(x).transpose(1, 2).contiguous()  # [batch, n_ov_heads, seq]

    def patterns(self, rows: slice) -> Tensor:
        """Return the attention patterns of some queries, [batch, n_qk_heads, rows, seq]."""
        c = self._config
        return attention_pattern(
            self._q[:, rows],
            self._k,
            scale=c.scale,
            window=c.window,
            softcap=c.softcap,
            first=rows.start,
        )

    @torch.no_grad()
    def blocks(self, ids: Tensor) -> Iterator[Block]:
        """Yield the contributions to heads' activations.

        Args:
            ids: heads of every token, [batch, seq, slots].
        """
        batch, _seq, slots = ids.shape
        which = torch.arange(batch, device=ids.device)[:, None, None]
        for rows in self._rows(batch * (slots + self._config.n_qk_heads)):
            heads = ids[:, rows].long()  # [batch, rows, slots]
            patterns = self.patterns(rows).transpose(1, 2)  # [batch, rows, n_qk_heads, seq]
            query = torch.arange(heads.shape[1], device=ids.device)[None, :, None]
            parts = patterns[which, query, heads // self._group]
            yield Block(rows, parts.mul_(self._v[which, heads]))

    @torch.no_grad()
    def of(self, which: Tensor, positions: Tensor, heads: Tensor) -> Tensor:
        """Return the contributions to single activations.

        Args:
            which, positions, heads: sequence in the batch, position and OV head, int64, [n].

        Returns:
            [n, seq].
        """
        parts = self._v[which, heads]
        for rows in self._rows(len(self._q) * self._config.n_qk_heads):
            mine = (positions >= rows.start) & (positions < rows.stop)
            if mine.any():
                patterns = self.patterns(rows)
                query = positions[mine] - rows.start
                parts[mine] *= patterns[which[mine], heads[mine] // self._group, query]
        return parts

    def _rows(self, width: int) -> Iterator[slice]:
        """Yield blocks of queries of which each has `width` rows of contributions or patterns."""
        seq = self._k.shape[1]
        step = max(1, BLOCK_ELEMENTS // (width * seq))
        for start in range(0, seq, step):
            yield slice(start, min(start + step, seq))


def contributions(lorsa: Lorsa, x: Tensor, ids: Tensor) -> Tensor:
    """Return what each source adds to the activations of heads, before any of them is left out.

    Args:
        lorsa: on x's device.
        x: the layer's input, [batch, seq, d_model].
        ids: heads of every token, [batch, seq, slots], as `Lorsa.encode` gives them.

    Returns:
        P[t, s] v[s], [batch, seq, slots, k_pos]; over k_pos they sum to z.
    """
    return torch.cat([block.parts for block in Sources(lorsa, x).blocks(ids)], dim=1)
