"""What explanations are asked for."""

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ...language.spelling import numbers
from ..schema import HEADS
from .endpoint import endpoint_url

SORTABLE = tuple(
    field.name
    for field in HEADS
    if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainConfig:
    """What explanations are asked for."""

    run: Path
    """Run folder with an analysis, or the folder of the analysis."""
    endpoint: str
    """URL of an OpenAI-compatible server, to which /chat/completions is added."""
    model: str
    """The model's name there."""
    heads: str | None = None
    """Heads to explain: 17,301 or 0-99; None takes the first `top`."""
    top: int | None = None
    """How many of those that fire, by `sort`; None takes 100."""
    sort: str = "frequency"
    """Column of heads.parquet, the largest first."""
    concurrency: int = 4
    """Requests under way at once."""
    requests_per_minute: float | None = None
    """At most; None sets no limit."""
    timeout: float = 120.0
    """Seconds after which a request without a whole reply is given up."""
    max_tokens: int = 1000
    """Of a reply: models that think aloud need more."""
    seed: int = 0
    """Of the contexts that a head is scored on."""
    price_in: float | None = None
    """USD for a million tokens sent."""
    price_out: float | None = None
    """USD for a million tokens received."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        endpoint_url(self.endpoint)
        if not self.model.strip():
            raise ValueError("model is empty; give the model's name at the endpoint")
        if self.heads is not None and self.top is not None:
            raise ValueError("heads and top exclude each other; give one")
        if self.heads is not None:
            numbers("heads", self.heads)
        if self.sort not in SORTABLE:
            raise ValueError(f"sort is {self.sort!r}; allowed: {', '.join(SORTABLE)}")
        for name in ("top", "concurrency", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        for name in ("timeout", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; allowed: more than 0")
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
