"""Settings of changing heads in the live model."""

import math
from dataclasses import dataclass
from pathlib import Path

from ..language.choices import DEVICES
from ..language.spelling import numbers

ERRORS = ("keep", "drop")


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig:
    """What an intervention on a prompt is asked for."""

    run: Path
    """Run folder, or any folder with a saved Lorsa."""
    model: str
    """Language model, as for a harvest."""
    heads: str
    """Heads that are changed: 17,301 or 0-7."""
    prompt: str | None = None
    """Text that the model reads, after its BOS if it has one."""
    tokens: str | None = None
    """Token ids in place of a prompt, as they are: 5,17,301."""
    scale: float | None = None
    """Factor of the heads' activations; None with `value` None is 0, which ablates them."""
    value: float | None = None
    """Activation that they get at every token, in place of a factor."""
    error: str = "keep"
    """Whether what the Lorsa misses of the layer's output stays ("keep") or not ("drop")."""
    top: int = 10
    """Next tokens that are shown."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        if (self.prompt is None) == (self.tokens is None):
            raise ValueError("give one of --prompt TEXT and --tokens 5,17,301")
        if self.prompt == "":
            raise ValueError("prompt is empty; give some text")
        numbers("heads", self.heads)
        if self.tokens is not None:
            numbers("tokens", self.tokens)
        if self.scale is not None and self.value is not None:
            raise ValueError(f"scale is {self.scale} and value {self.value}; give one of them")
        for name in ("scale", "value"):
            given = getattr(self, name)
            if given is not None and not math.isfinite(given):
                raise ValueError(f"{name} is {given}; allowed: a finite number")
        if self.error not in ERRORS:
            raise ValueError(f"error is {self.error!r}; allowed: {', '.join(ERRORS)}")
        if self.top < 1:
            raise ValueError(f"top is {self.top}; allowed: 1 or more")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; allowed: {', '.join(DEVICES)}")
