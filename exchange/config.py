"""What a conversion is asked for."""

from dataclasses import dataclass
from pathlib import Path

TARGETS = ("lorsa", "llamascopium")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """What a conversion is asked for."""

    source: str
    """Folder or Hub id of a Lorsa in any format."""
    out: Path
    """Folder to write; must be new or empty."""
    subfolder: str | None = None
    """Subfolder of the folder or repository, as layer-12; None takes the Lorsa in it or in its only
    subfolder."""
    revision: str | None = None
    """Branch, tag or commit of a repository on the Hub; None is its main branch."""
    to: str = "lorsa"
    """Format to write: "lorsa" or "llamascopium"."""
    model: str | None = None
    """Language model whose norm is folded in or out, where the tools read different hooks."""
    weighted: bool = False
    """Whether a foreign Lorsa reads ln1.hook_normalized of a model loaded without processing, where
    a LayerNorm's hook is after its weight and bias."""
    max_l0: int | None = None
    """Most heads that may fire on a token, for batchtopk and jumprelu; None keeps its own limit."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if self.to not in TARGETS:
            raise ValueError(f"to is {self.to!r}; allowed: {', '.join(TARGETS)}")
        if self.max_l0 is not None and self.max_l0 < 1:
            raise ValueError(f"max_l0 is {self.max_l0}; allowed: 1 or more")
        if self.weighted and self.model is None:
            raise ValueError("weighted says what a model's norm is; give the model too")
