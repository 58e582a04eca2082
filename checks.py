"""Checks of settings: a ValueError names the field, its value and what is allowed."""

import math
from collections.abc import Sequence
from typing import Any


def require_one_of(settings: Any, **allowed: Sequence[str]) -> None:
    """Raise ValueError unless fields have one of the values allowed."""
    for name, values in allowed.items():
        if (value := getattr(settings, name)) not in values:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(values)}")


def require_at_least(settings: Any, least: int, *names: str) -> None:
    """Raise ValueError unless fields are None or whole numbers of int64 from `least` on."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value < 1 << 63:
            raise ValueError(f"{name} is {value}; allowed: {least} or more")


def require_positive(settings: Any, *names: str) -> None:
    """Raise ValueError unless fields are None or finite numbers above 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; allowed: above 0")
