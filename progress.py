"""What an evaluation or an analysis tells while it runs."""

from collections.abc import Callable
from typing import NamedTuple


class Measured(NamedTuple):
    """How far one part of the work is."""

    done: int
    """Tokens measured"""
    total: int
    """Tokens of this part"""
    what: str
    """Where: "layer 12 on the store", "in the model" """
    tokens_per_second: float | None = None
    """None where the time left is not told"""


Report = Callable[[str | Measured], None]
"""Is told a line of text, or how far it is."""
