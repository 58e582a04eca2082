"""Settings of changing features in the live model."""

import math
from dataclasses import InitVar, dataclass
from pathlib import Path

from ..checks import require_at_least, require_one_of
from ..language.choices import DEVICES
from ..language.spelling import parse_ids

ERRORS = ("keep", "drop")


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig:
    """What an intervention on a prompt is asked for."""

    run: Path
    """Run folder, such as runs/layer-12, or any folder with a saved dictionary."""
    model: str
    """Language model, as for harvest."""
    features: str = ""
    """Features to change, of a Lorsa heads: 17,301 or 0-7."""
    heads: InitVar[str | None] = None  # earlier name of `features`
    prompt: str | None = None
    """Text that the model reads, after its BOS if it has one."""
    tokens: str | None = None
    """Token ids in place of a prompt, as they are: 5,17,301."""
    scale: float | None = None
    """Factor of the features' activations. None takes 0, which ablates them, unless `value` is
    given."""
    value: float | None = None
    """Activation of the features at every token, in place of a factor."""
    error: str = "keep"
    """What the dictionary misses of what it approximates: keep or drop it."""
    top: int = 10
    """Next tokens that are shown, those whose probability changes most."""
    device: str = "auto"
    """Device to compute on: auto, cpu or cuda."""

    def __post_init__(self, heads: str | None) -> None:
        if heads is not None:
            object.__setattr__(self, "features", heads)
        object.__setattr__(self, "run", Path(self.run))
        if (self.prompt is None) == (self.tokens is None):
            raise ValueError("give one of --prompt TEXT and --tokens 5,17,301")
        if self.prompt == "":
            raise ValueError("prompt is empty; give some text")
        parse_ids("features", self.features)
        if self.tokens is not None:
            parse_ids("tokens", self.tokens)
        if self.scale is not None and self.value is not None:
            raise ValueError(f"scale is {self.scale} and value {self.value}; give one of them")
        for name in ("scale", "value"):
            given = getattr(self, name)
            if given is not None and not math.isfinite(given):
                raise ValueError(f"{name} is {given}; allowed: a finite number")
        require_at_least(self, 1, "top")
        require_one_of(self, error=ERRORS, device=DEVICES)
