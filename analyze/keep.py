"""Which firings are kept of each feature: the largest, and an even sample of all.

Both keep the n entries of each feature with the largest keys. The key of a sample is a number drawn
by the entry itself, so neither depends on batches, on the order of tokens or on a stop between.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

NOWHERE = -1
"""Place of a slot that holds nothing."""


@dataclass(slots=True)
class Largest:
    """Entries of each feature with the largest keys so far, the largest first."""

    keys: Tensor
    """float64, [n_features, n]; -inf where there is none"""
    acts: Tensor
    """Activation of the entry, float32, [n_features, n]"""
    places: Tensor
    """Number of its token, counted through all sequences, int64, [n_features, n]"""

    @classmethod
    def none(cls, n_features: int, n: int) -> Self:
        """Return room for n entries of each feature."""
        shape = (n_features, n)
        return cls(
            torch.full(shape, -torch.inf, dtype=torch.float64),
            torch.zeros(shape),
            torch.full(shape, NOWHERE),
        )

    def add(self, features: Tensor, keys: Tensor, acts: Tensor, places: Tensor) -> None:
        """Take entries in; among equal keys the earlier place wins.

        Args:
            features, places: of each entry, int64, [n_entries].
            keys, acts: of each entry, float64 and float32, [n_entries].
        """
        n = self.keys.shape[1]
        better = keys > self.keys[features, -1]
        features, keys, acts, places = (each[better] for each in (features, keys, acts, places))
        if len(features) == 0:
            return
        touched, rows = features.unique(return_inverse=True)
        old = (self.keys[touched], self.acts[touched], self.places[touched])
        own = torch.arange(len(touched)).repeat_interleave(n)
        rows = torch.cat([own, rows])
        keys, acts, places = (
            torch.cat([mine.flatten(), new])
            for mine, new in zip(old, (keys, acts, places), strict=True)
        )
        # by row, then from the largest key, then from the earliest place
        order = torch.from_numpy(np.lexsort((places.numpy(), -keys.numpy(), rows.numpy())))
        rows = rows[order]
        first = torch.searchsorted(rows, torch.arange(len(touched)))
        rank = torch.arange(len(rows)) - first[rows]
        stay = order[rank < n]  # n of each row: it had n already
        self.keys[touched] = keys[stay].view(-1, n)
        self.acts[touched] = acts[stay].view(-1, n)
        self.places[touched] = places[stay].view(-1, n)


def largest_by_sequence(
    features: Tensor, acts: Tensor, places: Tensor, n_features: int, n_ctx: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each feature's largest |act| in each sequence, the earliest of equals.

    Args:
        features, acts, places: of each entry, [n_entries].
        n_features, n_ctx: features of the dictionary, and tokens of a sequence.

    Returns:
        features, acts, places, of one entry for every feature and sequence, in any order.
    """
    seqs = places // n_ctx
    first = int(seqs.min()) if len(seqs) else 0
    cell = (seqs - first) * n_features + features
    n_cells = int(cell.max()) + 1 if len(cell) else 0
    size = acts.abs()
    largest = torch.zeros(n_cells).scatter_reduce_(0, cell, size, "amax")
    is_largest = torch.nonzero(size == largest[cell]).squeeze(1)
    nowhere = torch.iinfo(torch.int64).max
    earliest = torch.full((n_cells,), nowhere)
    earliest.scatter_reduce_(0, cell[is_largest], places[is_largest], "amin")
    chosen = is_largest[places[is_largest] == earliest[cell[is_largest]]]
    return features[chosen], acts[chosen], places[chosen]


def draw(features: Tensor, places: Tensor) -> Tensor:
    """Return a number for each entry, even in [0, 1), by its feature and place alone.

    Source of the mixing: Steele et al. 2014, Fast splittable pseudorandom number generators.
    """
    x = (places * 0x9E3779B1 + features) * 0x1E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() * 2.0**-53


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return int64 shifted right as if it had no sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
