"""Kinds of dictionaries by name, and loading of any."""

from pathlib import Path

from .checkpoint import load as load_saved
from .dictionary import Dictionary
from .fetch import local_folder
from .lorsa.module import Lorsa
from .sae import Sae
from .transcoder import Transcoder

KINDS: dict[str, type[Dictionary]] = {"lorsa": Lorsa, "sae": Sae, "transcoder": Transcoder}
"""Class of each kind."""


def load(
    where: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    backend: str = "auto",
) -> Dictionary:
    """Read a dictionary of any kind; see `Dictionary.from_pretrained`."""
    folder = local_folder(where, revision=revision, subfolder=subfolder, token=token)
    saved = load_saved(folder)
    return KINDS[saved.kind].of(saved, backend=backend)
