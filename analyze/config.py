"""Settings of an analysis."""

from dataclasses import dataclass
from pathlib import Path

from ..checks import require_at_least, require_one_of
from ..language.choices import DEVICES
from ..store.places import Place, place

ANALYSIS_FOLDER = "analysis"
"""Folder of an analysis in its run."""

N_SAMPLE = 64
"""Firings of a head that its quantiles are estimated from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzeConfig:
    """What an analysis is asked for."""

    run: Path
    """Run folder, such as runs/layer-12, or any folder with a saved Lorsa."""
    store: Place
    """Store with its layer."""
    model: str | None = None
    """Language model for effects on the logits and for probes, as for harvest. None leaves them
    out."""
    out: Path | None = None
    """Folder to write. None takes RUN/analysis."""
    tokens: int | None = None
    """Stored tokens to look at. None takes all, at most a million."""
    n_top: int = 16
    """Examples of each head with the largest activations. At most one is of a sequence."""
    n_samples: int = 8
    """Examples besides, evenly from the head's largest activation to its smallest."""
    device: str = "auto"
    """Device to compute on: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        object.__setattr__(self, "store", place(self.store))
        if self.out is not None:
            object.__setattr__(self, "out", Path(self.out))
        require_at_least(self, 1, "tokens", "n_top")
        require_at_least(self, 0, "n_samples")
        if self.n_samples > N_SAMPLE:
            raise ValueError(f"n_samples is {self.n_samples}; allowed: 0..{N_SAMPLE}")
        require_one_of(self, device=DEVICES)

    @property
    def folder(self) -> Path:
        """Folder of the analysis."""
        return self.run / ANALYSIS_FOLDER if self.out is None else self.out
