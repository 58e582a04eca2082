"""Progress that an evaluation or an analysis reports while it runs."""

from collections.abc import Callable
from typing import NamedTuple


class Measured(NamedTuple):
    """Tokens done of one part of the work."""

    done: int
    """Tokens measured"""
    total: int
    """Tokens of this part"""
    what: str
    """Part of the work: "layer 12 on the store", "in the model" """
    tokens_per_second: float | None = None
    """Rate; None where no time left is shown"""


Report = Callable[[str | Measured], None]
"""Function that is called with a line of text, or with how far the work is."""
