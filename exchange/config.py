"""Settings of a conversion."""

from dataclasses import dataclass
from pathlib import Path

from ..checks import require_at_least, require_one_of

TARGETS = ("lorsa", "llamascopium")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """What a conversion is asked for."""

    source: str
    """Dictionary of any format: a run folder, one of another tool, or a Hub id."""
    out: Path
    """Folder to write; new or empty."""
    subfolder: str | None = None
    """Subfolder of the folder or repository: layer-12. None takes the only one there."""
    revision: str | None = None
    """Branch, tag or commit of a repository on the Hub. None takes main."""
    to: str = "lorsa"
    """Format to write: lorsa, or llamascopium for Lorsas."""
    model: str | None = None
    """Language model whose norm is folded in or out, as for harvest. It is needed where the tools
    read different hooks."""
    weighted: bool = False
    """The other tool loaded the model without processing, so a LayerNorm's hook is after its
    weight. The Lorsa then reads ln1.hook_normalized after weight and bias."""
    max_l0: int | None = None
    """Features that may fire on a token at most, of batchtopk and jumprelu. None takes it as it
    was."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        require_one_of(self, to=TARGETS)
        require_at_least(self, 1, "max_l0")
        if self.weighted and self.model is None:
            raise ValueError("weighted says what a model's norm is; give the model too")
