"""Settings of a push."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..hub import HUB_ID


@dataclass(frozen=True, kw_only=True, slots=True)
class PushConfig:
    """Dictionaries to share, and where."""

    runs: tuple[Path, ...]
    """Finished runs, such as runs/layer-12; one of each place. Any folders with a saved
    dictionary do."""
    repo: str
    """Repository on the Hugging Face Hub, owner/name, or a folder as ./name. An absolute path and a
    folder that is there are folders too."""
    private: bool = False
    """Make the repository private, if it is made."""
    revision: str | None = None
    """Branch, made from the main one if need be. None takes main."""
    message: str | None = None
    """Message of the commit. None takes the names of the layers."""
    license: str | None = None
    """Identifier of a license as the Hub has it: mit. None takes that of the card that is there, if
    any."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(map(Path, self.runs)))
        if not self.runs:
            raise ValueError("runs are empty; give one or more, such as runs/layer-12")
        if self.folder is not None:
            for name in ("private", "revision", "message"):
                if given := getattr(self, name):
                    raise ValueError(
                        f"{name} is {given!r}, which a folder ({self.repo}) has not: leave it out"
                    )
        elif not HUB_ID.fullmatch(self.repo):
            raise ValueError(
                f"repo is {self.repo!r}; allowed: owner/name on the Hub, or a folder as ./name"
            )
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ValueError(
                f"license is {self.license!r}; allowed: an identifier of the Hub, as mit or "
                "apache-2.0"
            )

    @property
    def folder(self) -> Path | None:
        """Folder that is meant; None is a repository on the Hub."""
        path = Path(os.path.expanduser(self.repo))
        is_path = self.repo.startswith((".", "~")) or path.is_absolute() or path.is_dir()
        return path if is_path else None
