"""Measures of a dictionary: fraction of variance unexplained (FVU), L0 and dead features.

    FVU = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2

over the same tokens, in the units of the activations, with one mean over all of them. Sums are
kept in float64 and the mean is updated as Chan et al. 1979 do, so any split into batches gives the
same figure and a large mean costs no precision.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .dictionary import Dictionary


@dataclass(slots=True)
class FVU:
    """Fraction of variance unexplained, added up batch by batch."""

    n_tokens: int = 0
    residual: float = 0.0
    """Sum of ||y - y_hat||^2 so far"""
    variance: float = 0.0
    """Sum of ||y - mean(y)||^2 so far"""
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Mean of y so far, [d_model]"""

    def update(self, y: Tensor, y_hat: Tensor) -> None:
        """Add tokens.

        Args:
            y, y_hat: outputs and their approximation, [..., d_model].

        Raises:
            ValueError: the shapes differ.
        """
        if y.shape != y_hat.shape:
            raise ValueError(f"y is {list(y.shape)}, y_hat is {list(y_hat.shape)}")
        y = y.detach().reshape(-1, y.shape[-1]).double()
        n_new = len(y)
        if n_new == 0:
            return
        residual = float((y - y_hat.detach().reshape(y.shape)).square().sum())
        mean = y.mean(dim=0)
        self.add(FVU(n_new, residual, float((y - mean).square().sum()), mean))

    def add(self, other: "FVU") -> None:
        """Add the tokens of another FVU."""
        n_all = self.n_tokens + other.n_tokens
        if other.n_tokens == 0:
            return
        self.mean = self.mean.to(other.mean.device)
        step = other.mean - self.mean
        self.residual += other.residual
        self.variance += other.variance
        self.variance += float(step.square().sum()) * self.n_tokens * other.n_tokens / n_all
        self.mean = self.mean + step * (other.n_tokens / n_all)
        self.n_tokens = n_all

    @property
    def value(self) -> float:
        """The fraction; NaN before any token and when y does not vary."""
        return self.residual / self.variance if self.variance > 0 else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """The measures of one dictionary on some tokens."""

    fvu: float
    """Fraction of the output's variance that is not explained, over the tokens that count."""
    l0: float
    """Mean number of features that fire on a token, with a nonzero activation."""
    dead_fraction: float
    """Share of features that fire on none of these tokens: the fewer tokens, the larger."""
    n_tokens: int
    """Tokens that count; the loss mask leaves the others out of the three measures above."""
    fvu_all: float
    """Fraction of variance unexplained over all tokens, counted or not."""
    masked_fraction: float
    """Share of all tokens that do not count."""


@torch.no_grad()
def evaluate(dictionary: Dictionary, batches: Iterable[Sequence[Tensor]]) -> Quality:
    """Measure a dictionary on batches of what it reads and what it should write.

    Args:
        dictionary: on the device of the batches.
        batches: x, y and, if not all tokens count, which do: each [batch, seq, d_model], and bool,
            [batch, seq].
    """
    tally = Tally(dictionary)
    for x, y, *counted in batches:
        tally.update(x, y, *counted)
    return tally.quality()


class TallySums(NamedTuple):
    """The sums of a tally, or of one process's share of it."""

    kept: FVU
    """FVU of the tokens that count"""
    left_out: FVU
    """FVU of the others"""
    firing: Tensor
    """Tokens that count on which each feature fires, int64, [n_features]"""


class Tally:
    """The sums from which the quality of one dictionary is computed, batch by batch."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.kept, self.left_out = FVU(), FVU()
        self.firing = torch.zeros(len(dictionary.W_O), dtype=torch.int64)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, counted: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x, y: [batch, seq, d_model].
            counted: which tokens count, bool, [batch, seq]; None counts all.
        """
        acts, ids = self.dictionary.encode(x)
        y_hat = self.dictionary.decode(acts, ids, x)
        if counted is not None:
            counted = counted.to(y.device)
            self.left_out.update(y[~counted], y_hat[~counted])
            y, y_hat, acts, ids = (values[counted] for values in (y, y_hat, acts, ids))
        self.kept.update(y, y_hat)
        self.firing += firing_counts(acts, ids, len(self.firing)).cpu()

    def sums(self) -> TallySums:
        """Return the sums so far, on the CPU."""
        kept, left_out = (replace(f, mean=f.mean.cpu()) for f in (self.kept, self.left_out))
        return TallySums(kept, left_out, self.firing)

    def become(self, parts: Iterable[TallySums]) -> None:
        """Replace the sums by those of several tallies, this one among them."""
        self.kept, self.left_out = FVU(), FVU()
        self.firing = torch.zeros_like(self.firing)
        for kept, left_out, firing in parts:
            self.kept.add(kept)
            self.left_out.add(left_out)
            self.firing += firing

    def quality(self) -> Quality:
        """Return the measures of all tokens so far."""
        both = replace(self.kept)
        both.add(self.left_out)
        return Quality(
            fvu=self.kept.value,
            l0=float(self.firing.sum()) / max(self.kept.n_tokens, 1),
            dead_fraction=float((self.firing == 0).double().mean()),
            n_tokens=self.kept.n_tokens,
            fvu_all=both.value,
            masked_fraction=self.left_out.n_tokens / max(both.n_tokens, 1),
        )


def firing_counts(acts: Tensor, ids: Tensor, n_features: int) -> Tensor:
    """Return how many tokens each feature fires on, int64, [n_features].

    Args:
        acts, ids: [..., slots]; a feature fires where its activation is not 0.
        n_features: of the dictionary.
    """
    return ids[acts != 0].long().bincount(minlength=n_features)
