"""Events that a harvest reports while it runs."""

from collections.abc import Callable
from typing import NamedTuple

from ..language.blockcheck import BlockChecks
from ..language.selfcheck import SelfCheck
from .plan import Estimate, Plan


class Progress(NamedTuple):
    """Tokens harvested so far, and how fast."""

    tokens: int
    """Tokens in the store so far"""
    n_tokens: int
    """Tokens of the whole store"""
    tokens_per_second: float
    """Rate of this process since its model began to run"""


HarvestEvent = str | Plan | SelfCheck | BlockChecks | Estimate | Progress
"""A line of text, or a record of one kind."""
HarvestReport = Callable[[HarvestEvent], None]
"""Function that a harvest calls with each event."""
