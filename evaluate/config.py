"""Settings of an evaluation."""

from dataclasses import dataclass
from pathlib import Path

from ..language.choices import DEVICES
from ..store.places import Place, place


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
