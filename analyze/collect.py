"""One pass over a store: how often each head fires, what it reads, which firings to show."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..dictionaries.lorsa.contributions import blocks, contributions_at
from ..dictionaries.lorsa.module import Lorsa
from .attention.kinds import Reading
from .keep import Kept, draw, largest_of_sequences

BATCH_TOKENS = 2048
"""Tokens of the store that are read at once."""

Parts = dict[str, Tensor]


@dataclass(slots=True)
class Collected:
    """What is known of every head after some sequences."""

    reading: Reading
    top: Kept
    """Largest |act|, at most one of a sequence"""
    sample: Kept
    """Of all firings, each as likely as any other"""
    sum_act: Tensor
    """sum of z, float64, [n_ov_heads]"""

    @classmethod
    def nothing(cls, n_ov_heads: int, *, n_top: int, n_sample: int) -> "Collected":
        """Return what is known before the first sequence."""
        return cls(
            Reading.zeros(n_ov_heads),
            Kept.none(n_ov_heads, n_top),
            Kept.none(n_ov_heads, n_sample),
            torch.zeros(n_ov_heads, dtype=torch.float64),
        )

    @torch.no_grad()
    def add(self, lorsa: Lorsa, x: Tensor, tokens: Tensor, first_place: int) -> None:
        """Add sequences.

        Args:
            lorsa: on x's device.
            x: the layer's input, [batch, seq, d_model].
            tokens: ids, [batch, seq].
            first_place: tokens before these, counted through all sequences.
        """
        projected = lorsa.project(x)
        acts, ids = lorsa.encode(projected)
        tokens = tokens.to(x.device)
        for block in blocks(lorsa, projected, ids):
            self.reading.add(block, acts, ids, tokens)
        fires = (acts != 0).cpu()
        acts, heads = acts.float().cpu()[fires], ids.long().cpu()[fires]
        batch, seq, slots = ids.shape
        place = first_place + torch.arange(batch * seq).view(batch, seq, 1)
        places = place.expand(batch, seq, slots)[fires]
        self.sum_act.index_add_(0, heads, acts.double())
        self.sample.add(heads, draw(heads, places), acts, places)
        heads, acts, places = largest_of_sequences(heads, acts, places, len(self.sum_act), seq)
        self.top.add(heads, acts.abs().double(), acts, places)

    def tensors(self) -> Parts:
        """Return all of it by name, to be kept while the pass is stopped."""
        found = {"sum_act": self.sum_act}
        for name in ("reading", "top", "sample"):
            part = getattr(self, name)
            found |= {f"{name}.{field.name}": getattr(part, field.name) for field in fields(part)}
        return found

    @classmethod
    def of_tensors(cls, tensors: Parts) -> "Collected":
        """Return what `tensors` gave."""

        def part(name: str) -> Parts:
            return {k.removeprefix(name): t for k, t in tensors.items() if k.startswith(name)}

        return cls(
            Reading(**part("reading.")),
            Kept(**part("top.")),
            Kept(**part("sample.")),
            tensors["sum_act"],
        )


class Chosen(NamedTuple):
    """The firings that are shown, sorted by head: the top ones of each, then the sample."""

    heads: Tensor
    """int64, [n]"""
    is_top: Tensor
    """Largest, or of the sample, bool, [n]"""
    ranks: Tensor
    """Within head and kind, from 0, int64, [n]"""
    quantiles: Tensor
    """Share of the head's firings with a smaller |act|, [n]"""
    acts: Tensor
    """z, [n]"""
    places: Tensor
    """Number of the token, int64, [n]"""


def choose(found: Collected, n_samples: int) -> tuple[Chosen, Tensor]:
    """Choose the firings to show.

    Args:
        found: what was collected.
        n_samples: firings of a head besides its top ones, evenly from the largest to the smallest.

    Returns:
        The firings; and |act| of the sample of each head in ascending order, NaN where it holds
        nothing, [n_ov_heads, n_sample].
    """
    top, sample = found.top, found.sample
    n_ov_heads, n_kept = sample.acts.shape
    is_held = torch.isfinite(sample.keys)
    size = torch.where(is_held, sample.acts.abs(), torch.nan)
    order = torch.where(is_held, size, torch.inf).argsort(dim=1)  # what is not held comes last
    ascending = size.gather(1, order)
    n_held = is_held.sum(dim=1, keepdim=True)
    quantile = 1 - (torch.arange(n_samples) + 0.5) / max(n_samples, 1)  # from the largest
    at = (quantile * n_held).long().clamp(max=n_kept - 1)  # [n_ov_heads, n_samples]
    shown = order.gather(1, at)
    # of a head with fewer firings than samples the same one comes up again: once is enough
    again = torch.zeros_like(shown, dtype=torch.bool)
    again[:, 1:] = at[:, 1:] == at[:, :-1]
    rank = (~again).cumsum(dim=1) - 1
    heads = torch.arange(n_ov_heads)[:, None]

    def flat(values: Tensor, keep: Tensor) -> Tensor:
        return values.expand(keep.shape)[keep]

    top_held = torch.isfinite(top.keys)
    held = (n_held > 0) & ~again
    n_top = top.acts.shape[1]
    columns = [
        (heads, heads),
        (torch.tensor([[True]]), torch.tensor([[False]])),
        (torch.arange(n_top)[None], rank),
        (torch.tensor([[1.0]]), at / n_held.clamp(min=1)),
        (top.acts, sample.acts.gather(1, shown)),
        (top.places, sample.places.gather(1, shown)),
    ]
    both = [torch.cat([flat(mine, top_held), flat(its, held)]) for mine, its in columns]
    by_head = both[0].argsort(stable=True)
    return Chosen(*(column[by_head] for column in both)), ascending


def sources_of(
    lorsa: Lorsa,
    chosen: Chosen,
    read: Callable[[list[int]], Tensor],
    *,
    n_ctx: int,
    n_sources: int,
    batch_seqs: int,
    report: Callable[[int, int], None] = lambda done, n: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the chosen firings read from.

    Args:
        lorsa: whose heads they are.
        chosen: the firings.
        read: returns x of sequences, on the Lorsa's device, [n, n_ctx, d_model].
        n_ctx: tokens of a sequence.
        n_sources: sources to keep of a firing, those with the largest |P v|.
        batch_seqs: sequences that are read at once.
        report: is told how many sequences of how many are done.

    Returns:
        Positions, int64, and contributions, both [n, n_sources], the largest first; and the sum of
        all contributions, [n].
    """
    n_sources = min(n_sources, n_ctx)
    seqs, which = (chosen.places // n_ctx).unique(return_inverse=True)
    order = which.argsort(stable=True)
    bounds = torch.searchsorted(which[order], torch.arange(len(seqs) + 1))
    positions = torch.zeros(len(which), n_sources, dtype=torch.int64)
    parts = torch.zeros(len(which), n_sources)
    total = torch.zeros(len(which))
    device = lorsa.W_V.device
    for start in range(0, len(seqs), batch_seqs):
        stop = min(start + batch_seqs, len(seqs))
        mine = order[bounds[start] : bounds[stop]]
        x = read(seqs[start:stop].tolist())
        where = (which[mine] - start, chosen.places[mine] % n_ctx, chosen.heads[mine])
        all_parts = contributions_at(lorsa, x, *(each.to(device) for each in where)).float().cpu()
        positions[mine] = all_parts.abs().topk(n_sources, dim=1).indices
        parts[mine] = all_parts.gather(1, positions[mine])
        total[mine] = all_parts.sum(dim=1)
        report(stop, len(seqs))
    return positions, parts, total
