"""Pass over a store: how often and how strongly features fire, and which firings to show."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..dictionaries.code import Code
from .keep import Largest, draw, largest_by_sequence

READ_TOKENS = 2048
"""Tokens of the store that are read at once."""

Tensors = dict[str, Tensor]


@dataclass(slots=True)
class Firings:
    """Counts, sums and examples of each feature's firings, over the sequences seen so far."""

    n_fired: Tensor
    """Tokens on which it fired, float64, [n_features]"""
    sum_act: Tensor
    """Sum of its activations, float64, [n_features]"""
    top: Largest
    """Largest |act|, at most one of a sequence"""
    sample: Largest
    """Even sample of all firings"""

    @classmethod
    def none(cls, n_features: int, *, n_top: int, n_sample: int) -> Self:
        """Return the firings of no sequence."""
        zeros = torch.zeros(n_features, dtype=torch.float64)
        return cls(
            zeros,
            zeros.clone(),
            Largest.none(n_features, n_top),
            Largest.none(n_features, n_sample),
        )

    def add(self, code: Code, first_place: int) -> None:
        """Add sequences.

        Args:
            code: the features that fire, acts and ids, each [batch, seq, slots].
            first_place: tokens before these, counted through all sequences.
        """
        fires = (code.acts != 0).cpu()
        acts, features = code.acts.float().cpu()[fires], code.ids.long().cpu()[fires]
        batch, seq, slots = code.ids.shape
        place = first_place + torch.arange(batch * seq).view(batch, seq, 1)
        places = place.expand(batch, seq, slots)[fires]
        self.n_fired += features.bincount(minlength=len(self.n_fired))
        self.sum_act.index_add_(0, features, acts.double())
        self.sample.add(features, draw(features, places), acts, places)
        features, acts, places = largest_by_sequence(features, acts, places, len(self.n_fired), seq)
        self.top.add(features, acts.abs().double(), acts, places)

    @property
    def mean_acts(self) -> Tensor:
        """Mean activation of each feature where it fires; NaN of those that never did."""
        return self.sum_act / self.n_fired

    def tensors(self) -> Tensors:
        """Return the tensors themselves, by name: a copy into them restores a pass."""
        parts = tensors_of(top=self.top, sample=self.sample)
        return {"n_fired": self.n_fired, "sum_act": self.sum_act} | parts


def tensors_of(**parts: Any) -> Tensors:
    """Return the tensors of dataclasses, by the names of both."""
    return {
        f"{name}.{field.name}": getattr(part, field.name)
        for name, part in parts.items()
        for field in fields(part)
    }


class Chosen(NamedTuple):
    """Firings that are shown, sorted by feature: the top ones of each, then the sample."""

    features: Tensor
    """int64, [n]"""
    is_top: Tensor
    """Whether it is among the largest, or else of the sample, bool, [n]"""
    ranks: Tensor
    """Rank within feature and kind, from 0, int64, [n]"""
    quantiles: Tensor
    """Share of the feature's firings with a smaller |act|, [n]"""
    acts: Tensor
    """Activations, [n]"""
    places: Tensor
    """Numbers of the tokens, counted through all sequences, int64, [n]"""


def choose_examples(found: Firings, n_samples: int) -> tuple[Chosen, Tensor]:
    """Choose the firings to show.

    Args:
        found: what was collected.
        n_samples: firings of a feature besides its top ones, evenly from the largest to the
            smallest.

    Returns:
        The firings; and |act| of the sample of each feature in ascending order, NaN where it holds
        nothing, [n_features, n_sample].
    """
    top, sample = found.top, found.sample
    n_features, n_kept = sample.acts.shape
    is_held = torch.isfinite(sample.keys)
    size = torch.where(is_held, sample.acts.abs(), torch.nan)
    order = torch.where(is_held, size, torch.inf).argsort(dim=1)  # what is not held comes last
    ascending = size.gather(1, order)
    n_held = is_held.sum(dim=1, keepdim=True)
    quantile = 1 - (torch.arange(n_samples) + 0.5) / max(n_samples, 1)  # from the largest
    at = (quantile * n_held).long().clamp(max=n_kept - 1)  # [n_features, n_samples]
    shown = order.gather(1, at)
    # of a feature with fewer firings than samples the same one comes up again: once is enough
    again = torch.zeros_like(shown, dtype=torch.bool)
    again[:, 1:] = at[:, 1:] == at[:, :-1]
    rank = (~again).cumsum(dim=1) - 1
    features = torch.arange(n_features)[:, None]

    def flat(values: Tensor, keep: Tensor) -> Tensor:
        return values.expand(keep.shape)[keep]

    top_held = torch.isfinite(top.keys)
    held = (n_held > 0) & ~again
    n_top = top.acts.shape[1]
    columns = [
        (features, features),
        (torch.tensor([[True]]), torch.tensor([[False]])),
        (torch.arange(n_top)[None], rank),
        (torch.tensor([[1.0]]), at / n_held.clamp(min=1)),
        (top.acts, sample.acts.gather(1, shown)),
        (top.places, sample.places.gather(1, shown)),
    ]
    both = [torch.cat([flat(mine, top_held), flat(its, held)]) for mine, its in columns]
    by_feature = both[0].argsort(stable=True)
    return Chosen(*(column[by_feature] for column in both)), ascending
