"""Types that heads are called by, and by what: text, probes or both.

A head can be called by a type whose share has a lower bound of at least half. Of several the
largest is taken, in this order: those that text and probes both give, those of the text, and those
of the probes where the text cannot tell; each time first the types of one kind of source, then
local and long_range, which hold others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import LABEL_FROM, LEAST_FIRED, N_SINGLE, STORE_SCORES


class Types(NamedTuple):
    """Types of heads."""

    type: list[str]
    """One of TYPES in schema.py each, [n_heads]"""
    by: list[str | None]
    """One of BY in choices.py each; None of a head that is of no type, [n_heads]"""


def types_of(n_fired: Tensor, text: Tensor, probes: Tensor | None) -> Types:
    """Return what heads are called by.

    Args:
        n_fired: tokens of the text on which each fired, [n_heads].
        text, probes: lower bounds of their shares, NaN where nothing can be told,
            [n_heads, kinds]; probes are None where there was no language model.
    """
    if probes is None:
        probes = torch.full_like(text, torch.nan)
    neither = torch.where(text.isnan(), probes, torch.nan)
    found = Types(_unnamed(n_fired), [None] * len(n_fired))
    for scores, by in ((torch.minimum(text, probes), "both"), (text, "text"), (neither, "probes")):
        for kinds in (range(N_SINGLE), range(N_SINGLE, len(STORE_SCORES))):
            best, at = scores[:, kinds].nan_to_num(nan=-1.0).max(dim=1)
            for head in ((best >= LABEL_FROM) & (n_fired > 0)).nonzero()[:, 0].tolist():
                if found.by[head] is None:
                    kind = kinds[int(at[head])]
                    denied = by == "text" and not probes[head, kind].isnan()
                    found.type[head] = STORE_SCORES[kind]
                    found.by[head] = "disputed" if denied else by
    return found


def _unnamed(n_fired: Tensor) -> list[str]:
    """Return what heads are called that are of no type."""
    return [
        "silent" if n == 0 else "rare" if n < LEAST_FIRED else "mixed" for n in n_fired.tolist()
    ]
