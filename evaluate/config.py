"""Settings of an evaluation."""

from dataclasses import dataclass
from pathlib import Path

from ..checks import require_at_least, require_one_of
from ..language.choices import DEVICES
from ..store.places import Place, place


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What an evaluation is asked for."""

    run: Path
    """Run folder, or any folder with a saved dictionary."""
    store: Place
    """Store with its sites."""
    model: str | None = None
    """Language model for cross-entropies, as for harvest. None leaves them out."""
    tokens: int | None = None
    """Held-out tokens for the measures on the store. None takes all."""
    ce_tokens: int = 16_384
    """Held-out tokens for cross-entropies, which cost five forward passes each."""
    each: bool = True
    """Run the language model with each run alone in its place, besides all of them at once."""
    device: str = "auto"
    """Device to compute on: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        object.__setattr__(self, "store", place(self.store))
        require_at_least(self, 1, "tokens", "ce_tokens")
        require_one_of(self, device=DEVICES)
