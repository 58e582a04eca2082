"""Lower bounds of shares, of sequences that are drawn at random with all their tokens.

    R    = C / O                   C, O: sums of c and o over n sequences
    se^2 = n / (n - 1) (sum c^2 - 2 R sum c o + R^2 sum o^2) / O^2
    low  = R - t se                t: 95 % quantile of Student's t, n - 1 degrees of freedom

c is what a sequence has of a kind, o what it could have. low is never above 0.05^(1 / m), m = O^2 /
sum o^2, which is all that m sequences of equal size can tell even if none is an exception; so no
bound rests on one long text. Source: the ratio estimator, Cochran 1977, Sampling Techniques,
chapter 6; m as in Kish 1965, Survey Sampling.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import LEAST_FIRED

LEAST_SEQS = 8
"""Sequences below which nothing is told: 0.05^(1/8) is 0.69, and half of it would be no bound."""
DOUBT = 0.05
"""Chance that the true share lies below the bound."""
Z = 1.6448536269514722
"""Quantile of the normal distribution at 1 - DOUBT."""


class Sums(NamedTuple):
    """Sums over sequences, float64, of any one shape."""

    c: Tensor
    """sum c"""
    o: Tensor
    """sum o"""
    cc: Tensor
    """sum c^2"""
    co: Tensor
    """sum c o"""
    oo: Tensor
    """sum o^2"""
    n: Tensor
    """Sequences with o > 0"""

    @classmethod
    def of(cls, c: Tensor, o: Tensor) -> "Sums":
        """Return the sums over the first axis."""
        pairs = (c, o, c * c, c * o, o * o, (o > 0).to(o))
        return cls(*(each.double().sum(dim=0) for each in pairs))


def lower_bounds(sums: Sums, fired: Tensor | None = None) -> Tensor:
    """Return lower bounds of c / o, in the shape of the sums; NaN where too little was seen.

    Args:
        sums: over sequences.
        fired: firings that the sums are of; below LEAST_FIRED nothing is told.
    """
    c, o, cc, co, oo, n = sums
    ratio = c / o
    spread = (cc - 2 * ratio * co + ratio.square() * oo).clamp(min=0)
    error = (spread * n / (n - 1)).sqrt() / o
    low = (ratio - t_quantile(n - 1) * error).clamp(min=0)
    low = torch.minimum(low, DOUBT ** (oo / o.square()))
    enough = n >= LEAST_SEQS if fired is None else (n >= LEAST_SEQS) & (fired >= LEAST_FIRED)
    return torch.where(enough & (o > 0), low, torch.nan)


def t_quantile(df: Tensor) -> Tensor:
    """Return the quantile of Student's t at 1 - DOUBT, to 1e-3 from 5 degrees of freedom on.

    Source: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 26.7.5.
    """
    z, z3, z5, z7 = (Z**power for power in (1, 3, 5, 7))
    terms = [
        (z3 + z) / 4,
        (5 * z5 + 16 * z3 + 3 * z) / 96,
        (3 * z7 + 19 * z5 + 17 * z3 - 15 * z) / 384,
    ]
    found: Tensor = z + terms[0] / df + terms[1] / df**2 + terms[2] / df**3
    return found
