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


class Stages(NamedTuple):
    """Parts of the work, which come in this order; told before the first."""

    names: tuple[str, ...]
    """A line that begins so, or a `Measured` of it, begins a part"""


Report = Callable[[str | Measured | Stages], None]
"""Function that is called with a line of text, with the parts of the work, or with how far it is.
"""
