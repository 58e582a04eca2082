"""What analyses are asked for."""

from dataclasses import dataclass
from pathlib import Path

from ..language.choices import DEVICES
from ..store.places import Place, place

FOLDER = "analysis"
"""Folder of an analysis, in that of its run."""

N_SAMPLE = 64
"""Firings of a head that its quantiles are estimated from."""


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
