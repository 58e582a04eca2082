"""Types of heads: what names them, and by what."""

from typing import Any

import pytest
import torch
from lorsa.analyze.attention.types import types_of
from lorsa.analyze.choices import STORE_SCORES


def bounds(**known: float) -> torch.Tensor:
    """Return the bounds of one head, 0 where nothing is said."""
    return torch.tensor([[known.get(name, 0.0) for name in STORE_SCORES]])


def called(text: torch.Tensor, probes: torch.Tensor | None, n: int = 500) -> tuple[Any, Any]:
    found = types_of(torch.tensor([float(n)]), text, probes)
    return found.type[0], found.by[0]


NOTHING = bounds() * torch.nan


@pytest.mark.parametrize(
    ("text", "probes", "expected"),
    [
        (bounds(induction=0.8), bounds(induction=0.7), ("induction", "both")),
        (bounds(induction=0.8), bounds(induction=0.1), ("induction", "disputed")),
        (bounds(induction=0.8), NOTHING, ("induction", "text")),
        (bounds(induction=0.8), None, ("induction", "text")),
        (NOTHING, bounds(induction=0.8), ("induction", "probes")),
        (bounds(induction=0.2), bounds(induction=0.8), ("mixed", None)),
        (bounds(induction=0.49), bounds(induction=0.9), ("mixed", None)),
        (NOTHING, NOTHING, ("mixed", None)),
        (bounds(local=0.9, previous_token=0.6), bounds(local=0.9, previous_token=0.6),
         ("previous_token", "both")),
        (bounds(local=0.9, previous_token=0.6), bounds(local=0.9), ("local", "both")),
        (bounds(same_token=0.9, induction=0.6), bounds(same_token=0.1, induction=0.6),
         ("induction", "both")),
        (bounds(long_range=0.7, first_token=0.4), None, ("long_range", "text")),
    ],
)  # fmt: skip
def test_a_head_is_called_by_what_text_and_probes_give(
    text: torch.Tensor, probes: torch.Tensor | None, expected: tuple[str, str | None]
) -> None:
    """Types were those of the text alone, whatever the probes said."""
    assert called(text, probes) == expected


@pytest.mark.parametrize(("n", "expected"), [(0, "silent"), (1, "rare"), (19, "rare")])
def test_a_few_firings_are_no_type(n: int, expected: str) -> None:
    """A head that fired once was called induction; 100 heads of a layer had less than 20."""
    assert called(NOTHING, NOTHING, n) == (expected, None)


def test_probes_name_no_head_that_is_silent_in_text() -> None:
    assert called(NOTHING, bounds(induction=0.9), 0) == ("silent", None)
    assert called(NOTHING, bounds(induction=0.9), 3) == ("induction", "probes")
