"""Settings of explanations."""

import math
from dataclasses import dataclass
from pathlib import Path

from ...checks import require_at_least, require_one_of, require_positive
from ...language.spelling import parse_ids
from ..choices import SORTABLE
from .endpoint import endpoint_url


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainConfig:
    """What explanations are asked for."""

    run: Path
    """Run folder with an analysis, or the folder of the analysis."""
    endpoint: str
    """URL of an OpenAI-compatible server: http://127.0.0.1:8080/v1. /chat/completions is added."""
    model: str
    """Name of the language model there, which explains."""
    heads: str | None = None
    """Heads to explain: 17,301 or 0-99. None takes the first ones by `sort`."""
    top: int | None = None
    """Number of heads to explain, of those that fire. None takes 100."""
    sort: str = "frequency"
    """Column of numbers in heads.parquet that heads are taken by, the largest first."""
    concurrency: int = 4
    """Requests under way at once."""
    requests_per_minute: float | None = None
    """Requests in a minute at most. None takes no limit."""
    timeout: float = 120.0
    """Seconds after which a request without a whole reply is given up."""
    max_tokens: int = 1000
    """Tokens of a reply at most; models that think aloud need more."""
    seed: int = 0
    """Seed of the contexts that a head is scored on."""
    price_in: float | None = None
    """USD per million tokens sent."""
    price_out: float | None = None
    """USD per million tokens received."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        endpoint_url(self.endpoint)
        if not self.model.strip():
            raise ValueError("model is empty; give the model's name at the endpoint")
        if self.heads is not None and self.top is not None:
            raise ValueError("heads and top exclude each other; give one")
        if self.heads is not None:
            parse_ids("heads", self.heads)
        require_one_of(self, sort=SORTABLE)
        require_at_least(self, 1, "top", "concurrency", "max_tokens")
        require_positive(self, "timeout", "requests_per_minute")
        prices = (self.price_in, self.price_out)
        if any(price is not None and not 0 <= price < math.inf for price in prices):
            raise ValueError(f"prices are {prices}; allowed: 0 or more")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("a cost needs both price_in and price_out")

    def cost(self, tokens_in: float, tokens_out: float) -> float | None:
        """Return what tokens cost in USD; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
