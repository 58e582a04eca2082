"""What a harvest tells while it runs."""

from collections.abc import Callable
from typing import NamedTuple

from ..language.selfcheck import SelfCheck
from .plan import Estimate, Plan


class Progress(NamedTuple):
    """Where a harvest stands."""

    tokens: int
    """Tokens in the store so far"""
    n_tokens: int
    """Tokens of the whole store"""
    tokens_per_second: float
    """Of this process, since its model began to run"""


Event = str | Plan | SelfCheck | Estimate | Progress
Report = Callable[[Event], None]
