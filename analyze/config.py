"""What analyses are asked for."""

import math
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..model import DEVICES
from ..store import Place, place
from .intervene import ERRORS
from .result import FOLDER

N_SAMPLE = 64
"""Firings of a head that its quantiles are estimated from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What an evaluation is asked for."""

    run: Path
    """Run folder, or any folder with a saved Lorsa."""
    store: Place
    """Store with its layer."""
    model: str | None = None
    """Language model for the cross-entropies; None leaves them out."""
    tokens: int | None = None
    """Held-out tokens for what is measured on the store; None takes all."""
    ce_tokens: int = 16_384
    """Held-out tokens for the cross-entropies, which cost four forward passes each."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        object.__setattr__(self, "store", place(self.store))
        for name in ("tokens", "ce_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; allowed: {', '.join(DEVICES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzeConfig:
    """What an analysis is asked for."""

    run: Path
    """Run folder, or any folder with a saved Lorsa."""
    store: Place
    """Store with its layer."""
    model: str | None = None
    """Language model, for effects on the logits and for probes; None leaves them out."""
    out: Path | None = None
    """Folder of the analysis; None is `analysis` in the run."""
    tokens: int | None = None
    """Stored tokens to look at; None takes all, at most a million."""
    n_top: int = 16
    """Examples of a head with the largest activations, at most one of a sequence."""
    n_samples: int = 8
    """Examples besides, evenly from the head's largest activation to its smallest."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        object.__setattr__(self, "store", place(self.store))
        if self.out is not None:
            object.__setattr__(self, "out", Path(self.out))
        for name, least in (("tokens", 1), ("n_top", 1), ("n_samples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; allowed: {least} or more")
        if self.n_samples > N_SAMPLE:
            raise ValueError(f"n_samples is {self.n_samples}; allowed: 0..{N_SAMPLE}")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; allowed: {', '.join(DEVICES)}")

    @property
    def folder(self) -> Path:
        """Folder of the analysis."""
        return self.run / FOLDER if self.out is None else self.out


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


def numbers(name: str, text: str) -> list[int]:
    """Return the numbers in a text such as 17,301 or 0-7, in its order.

    Args:
        name: of the setting, for messages.
        text: numbers and ranges, joined by commas.

    Raises:
        ValueError: it is anything else, or nothing.
    """
    parts = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip()) for part in text.split(",")]
    ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in parts if m is not None]
    if None in parts or not all(ranges):
        raise ValueError(f"{name} is {text!r}; allowed: numbers such as 17,301 or 0-7")
    return list(chain.from_iterable(ranges))
