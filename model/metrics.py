"""How well a Lorsa stands in for its layer: FVU, L0 and dead heads.

    FVU = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2

over the same tokens, in the units of the activations, with one mean over all of them. Sums are
kept in float64 and the mean is updated as Chan et al. 1979 do, so any split into batches gives the
same figure and a large mean costs no precision.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .lorsa import Lorsa


@dataclass(slots=True)
class FVU:
    """Fraction of variance unexplained, added up batch by batch."""

    n_tokens: int = 0
    residual: float = 0.0
    """sum ||y - y_hat||^2 so far"""
    variance: float = 0.0
    """sum ||y - mean(y)||^2 so far"""
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """mean(y) so far, [d_model]"""

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
        self.residual += float((y - y_hat.detach().reshape(y.shape)).square().sum())
        mean_new = y.mean(dim=0)
        self.mean = self.mean.to(mean_new.device)
        step = mean_new - self.mean
        n_all = self.n_tokens + n_new
        self.variance += float((y - mean_new).square().sum())
        self.variance += float(step.square().sum()) * self.n_tokens * n_new / n_all
        self.mean = self.mean + step * (n_new / n_all)
        self.n_tokens = n_all

    @property
    def value(self) -> float:
        """The fraction; NaN before any token and when y does not vary."""
        return self.residual / self.variance if self.variance > 0 else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What `evaluate` measures."""

    fvu: float
    """Fraction of the output's variance that is not explained."""
    l0: float
    """Mean number of heads with a nonzero activation per token."""
    dead_fraction: float
    """Share of heads that fired on none of these tokens; the fewer tokens, the larger it reads."""
    n_tokens: int
    """Tokens looked at."""


def evaluate(lorsa: Lorsa, batches: Iterable[tuple[Tensor, Tensor]]) -> Quality:
    """Measure a Lorsa on batches of its layer's input and output.

    Args:
        lorsa: on the device of the batches.
        batches: pairs x, y, each [batch, seq, d_model].

    Returns:
        FVU, L0 and dead heads over all tokens of all batches.
    """
    return evaluate_all([lorsa], batches)[0]


@torch.no_grad()
def evaluate_all(
    lorsas: Sequence[Lorsa], batches: Iterable[tuple[Tensor, Tensor]]
) -> list[Quality]:
    """Measure several Lorsas of one layer in one pass over the batches; see `evaluate`."""
    tallies = [_Tally(lorsa) for lorsa in lorsas]
    for x, y in batches:
        for tally in tallies:
            tally.update(x, y)
    return [tally.quality() for tally in tallies]


class _Tally:
    """The measures of one Lorsa, added up batch by batch."""

    def __init__(self, lorsa: Lorsa) -> None:
        self.lorsa = lorsa
        self.fvu = FVU()
        self.firing = torch.zeros(lorsa.config.n_ov_heads, dtype=torch.int64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add tokens, [batch, seq, d_model]."""
        acts, ids = self.lorsa.encode(x)
        self.fvu.update(y, self.lorsa.decode(acts, ids))
        self.firing += firing_counts(acts, ids, len(self.firing)).cpu()

    def quality(self) -> Quality:
        """Return the measures."""
        return Quality(
            fvu=self.fvu.value,
            l0=float(self.firing.sum()) / max(self.fvu.n_tokens, 1),
            dead_fraction=float((self.firing == 0).double().mean()),
            n_tokens=self.fvu.n_tokens,
        )


def firing_counts(acts: Tensor, ids: Tensor, n_ov_heads: int) -> Tensor:
    """Return how many tokens each head fired on, int64, [n_ov_heads].

    Args:
        acts, ids: [batch, seq, top_k]; a head fires where its activation is not 0.
    """
    return ids[acts != 0].long().bincount(minlength=n_ov_heads)
