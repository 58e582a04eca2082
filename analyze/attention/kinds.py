"""Types of attention: the share of its reading that a head takes from tokens of a kind.

    share = sum |P[t, s] v[s]| over sources s of the kind  /  the same over all sources

Both sums run over the tokens t > 0 on which the head fires and which see a source of the kind: a
head is not blamed for what a text does not offer, or a window hides. m[s] is the token at s:

    previous_token    s = t - 1
    same_token        s = t
    duplicate_token   s < t and m[s] = m[t]
    induction         0 < s < t and m[s - 1] = m[t]
    first_token       s = 0 < t - 1; at t = 1 it is the previous token, no sign of a sink
    local             t - 8 <= s < t
    long_range        s <= t - 64

In text a common token has many duplicates, and a head that reads everywhere reads them too; random
tokens that are repeated once (probes.py) have one source of each kind. Names as in Elhage
et al. 2021 (A Mathematical Framework for Transformer Circuits) and Olsson et al. 2022 (In-context
Learning and Induction Heads).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...dictionaries.code import Code
from ...dictionaries.lorsa.contributions import Block, blocks
from ...dictionaries.lorsa.module import Lorsa
from ..choices import STORE_SCORES
from ..schema import DISTANCES
from .bounds import Sums, lower_bounds

LOCAL = 8
"""Distance up to which tokens are near."""
LONG = 64
"""Distance from which on tokens are far."""
N_KINDS, N_BUCKETS = len(STORE_SCORES), len(DISTANCES)
SUMMED = {
    "by_kind": N_KINDS,
    "by_distance": N_BUCKETS,
    "distance": 1,
    "amount": 1,
    "entropy": 1,
    "offered": N_KINDS,
    "n_offered": N_KINDS,
    "n_fired": 1,
}
"""Widths of what is summed over firings, in the order of the columns of one."""


def kinds(tokens: Tensor, rows: slice, window: int | None = None) -> Tensor:
    """Return which sources are of which kind to some queries.

    Args:
        tokens: ids, [batch, seq].
        rows: positions of the queries.
        window: how many positions a query sees, itself among them; None sees all before.

    Returns:
        bool, [batch, rows, seq, kinds], in the order of STORE_SCORES.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    distance = position[rows, None] - position[None, :]  # [rows, seq]
    before = distance > 0
    here = tokens[:, rows, None]
    preceding = torch.roll(tokens, 1, dims=1)[:, None, :]  # [batch, 1, seq]; of s = 0, none
    found = {
        "previous_token": distance == 1,
        "same_token": distance == 0,
        "duplicate_token": before & (tokens[:, None, :] == here),
        "induction": before & (position > 0) & (preceding == here),
        "first_token": (position == 0) & (distance > 1),
        "local": before & (distance <= LOCAL),
        "long_range": distance >= LONG,
    }
    shape = (len(tokens), *distance.shape)
    stacked = torch.stack([found[name].expand(shape) for name in STORE_SCORES], dim=-1)
    seen = (position[rows, None] > 0) & (distance < (window or len(position) + 1))  # [rows, seq]
    return stacked & seen[:, :, None]


def _of_distance(rows: slice, seq: int, kind: Tensor) -> Tensor:
    """Return what is summed of each source besides its kinds: its bucket, its distance, and 1.

    Returns:
        [batch, rows, seq, buckets + 2], batch and device as of `kind`.
    """
    position = torch.arange(seq, device=kind.device)
    distance = (position[rows, None] - position[None, :]).clamp(min=0)  # [rows, seq]
    edges = torch.tensor(DISTANCES, device=kind.device)
    bucket = torch.nn.functional.one_hot(
        torch.bucketize(distance, edges, right=True) - 1, N_BUCKETS
    )
    rest = torch.stack([distance, torch.ones_like(distance)], dim=-1)
    both = torch.cat([bucket, rest], dim=-1)
    return both.expand(len(kind), *both.shape)


@dataclass(slots=True)
class Attended:
    """Sums of what each head reads, over the tokens t > 0 on which it fires; all float64."""

    n_fired: Tensor
    """Tokens on which it fired, t = 0 among them, [n_ov_heads]"""
    amount: Tensor
    """sum |P v|, [n_ov_heads]"""
    distance: Tensor
    """sum |P v| (t - s), [n_ov_heads]"""
    entropy: Tensor
    """sum of a token's |P v| times its entropy, [n_ov_heads]"""
    by_distance: Tensor
    """sum |P v| in each bucket, [n_ov_heads, buckets]"""
    by_kind: Tensor
    """sum |P v| from sources of each kind, [n_ov_heads, kinds]"""
    offered: Tensor
    """sum |P v| over tokens that have a source of the kind, [n_ov_heads, kinds]"""
    n_offered: Tensor
    """Tokens on which it fired that have a source of the kind, [n_ov_heads, kinds]"""
    n_seqs: Tensor
    """Sequences with such tokens, [n_ov_heads, kinds]"""
    kind_squared: Tensor
    """sum over sequences of a sequence's by_kind squared, [n_ov_heads, kinds]"""
    kind_offered: Tensor
    """sum over sequences of a sequence's by_kind times its offered, [n_ov_heads, kinds]"""
    offered_squared: Tensor
    """sum over sequences of a sequence's offered squared, [n_ov_heads, kinds]"""

    @classmethod
    def none(cls, n_ov_heads: int) -> Self:
        """Return the sums over no token."""
        widths = [SUMMED.get(name, N_KINDS) for name in cls.__slots__]
        zeros = (torch.zeros(n_ov_heads, width, dtype=torch.float64) for width in widths)
        return cls(*(each.squeeze(1) for each in zeros))

    @torch.no_grad()
    def add(self, lorsa: Lorsa, x: Tensor, tokens: Tensor) -> Code:
        """Add sequences, and return what fires in them.

        Args:
            lorsa: whose heads they are, on x's device.
            x: the layer's input, [batch, seq, d_model].
            tokens: ids, on any device, [batch, seq].
        """
        projected = lorsa.project(x)
        code = lorsa.encode(projected)
        tokens = tokens.to(x.device)
        found = [_read(block, code, tokens) for block in blocks(lorsa.config, projected, code.ids)]
        seqs, heads, sums = (torch.cat(each) for each in zip(*found, strict=True))
        self._add(seqs, heads, sums)
        return code

    def _add(self, seqs: Tensor, heads: Tensor, sums: Tensor) -> None:
        """Add firings: their sequences, their heads, each [n], and columns SUMMED, [n, columns]."""
        n_ov_heads = len(self.amount)
        both, row = (seqs * n_ov_heads + heads).unique(return_inverse=True)
        of_seq = torch.zeros(len(both), sums.shape[1], dtype=torch.float64)
        of_seq.index_add_(0, row, sums.double())
        parts = dict(zip(SUMMED, of_seq.split(list(SUMMED.values()), dim=1), strict=True))
        c, o = parts["by_kind"], parts["offered"]
        parts |= {"n_seqs": (o > 0).double(), "kind_squared": c * c}
        parts |= {"kind_offered": c * o, "offered_squared": o * o}
        for name, part in parts.items():
            mine = getattr(self, name)
            mine.index_add_(0, both % n_ov_heads, part.view(-1, *mine.shape[1:]))

    def shares(self) -> dict[str, Tensor]:
        """Return each head's share of every kind, float64, [n_ov_heads]; NaN where undefined."""
        found = self.by_kind / self.offered
        return dict(zip(STORE_SCORES, found.unbind(dim=1), strict=True))

    def bounds(self) -> Tensor:
        """Return lower bounds of the shares, [n_ov_heads, kinds]; NaN where too little was seen."""
        sums = Sums(
            self.by_kind,
            self.offered,
            self.kind_squared,
            self.kind_offered,
            self.offered_squared,
            self.n_seqs,
        )
        return lower_bounds(sums, self.n_offered)


def _read(block: Block, code: Code, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what fires at some queries; the block's contributions are overwritten.

    Returns:
        Sequences in the batch and heads, int64, [n] each; the columns SUMMED, [n, columns].
    """
    rows, parts = block.rows, block.parts.abs_()
    if rows.start == 0:
        parts[:, 0] = 0  # the first token has itself alone to read
    _batch, _n_rows, _slots, seq = parts.shape
    tokens = tokens[:, : rows.stop]
    kind = kinds(tokens, rows, block.window)
    columns = torch.cat([kind, _of_distance(rows, seq, kind)], dim=-1).to(parts.dtype)
    sums = parts @ columns  # [batch, rows, slots, columns]
    amount = sums[..., -1:]
    # sum c log (amount / c), c = |P v|
    entropy = torch.special.entr(parts).sum(dim=-1, keepdim=True) + torch.xlogy(amount, amount)
    has = kind.any(dim=2)[:, :, None].expand(*amount.shape[:3], N_KINDS)
    found = torch.cat([sums, entropy, has * amount, has, torch.ones_like(amount)], dim=-1)
    fires = code.acts[:, rows] != 0
    heads = code.ids[:, rows][fires].long().cpu()
    return fires.nonzero()[:, 0].cpu(), heads, found[fires].cpu()
