"""A run as it is shared: its Lorsa under public names, its facts, and the seal of both."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..dictionaries.attach import require_site_read
from ..dictionaries.checkpoint import is_bound, load, save
from ..dictionaries.choices import CONFIG, WEIGHTS
from ..dictionaries.fetch import local_folder
from ..dictionaries.lorsa.config import LorsaConfig
from ..errors import PublishError
from ..evaluate.kept import weights_sha256
from ..seal import SEAL, seal_of
from .facts import public_model, read_run, training_facts
from .repository import TRAINING, File


class Shared(NamedTuple):
    """A Lorsa to share."""

    run: Path
    """Folder of the run"""
    facts: dict[str, Any]
    """Content of training.json"""
    files: list[File]
    """Files to send, all of one folder"""

    @property
    def folder(self) -> str:
        """Name of the folder in the repository."""
        return f"layer-{self.facts['layer']}"


def share(run: Path, spare: Path) -> Shared:
    """Return the files and facts of a run, after reading all of it.

    Args:
        run: folder of a finished run, or with a saved Lorsa.
        spare: folder that is not there; is made for the Lorsa, if not a byte of it can stay: where
            a name changes, or nothing binds its files to each other. It is needed until they are
            sent.

    Raises:
        CheckpointError: the run holds no Lorsa, or a damaged one.
        PublishError: it is not finished, or its Lorsa cannot be shared.
    """
    read_run(run)  # an unfinished run has no Lorsa: the error says which of the two it is
    folder = local_folder(run)
    saved = load(folder)  # fails here if it is damaged
    config = saved.config
    if not isinstance(config, LorsaConfig):
        raise PublishError(f"{run} holds {config.title}; only Lorsas can be pushed")
    if config.layer is None:
        raise PublishError(f"{run} does not say which layer it replaces")
    require_site_read(config, run, PublishError)
    if not (folder / WEIGHTS).is_file():
        raise PublishError(
            f"{run} is in another tool's format; type: lorsa convert {run} FOLDER, and push that"
        )
    facts = training_facts(folder, config)
    source = folder
    if public_model(config) != config.base_model or not is_bound(folder):
        public = config.to_dict() | {"base_model": public_model(config)}
        save(saved._replace(config=type(config).from_dict(public)), spare)
        source, facts["weights_sha256"] = spare, weights_sha256(spare)
    contents: dict[str, bytes | Path] = {
        CONFIG: (source / CONFIG).read_bytes(),
        WEIGHTS: source / WEIGHTS,
        TRAINING: _json(facts),
    }
    contents[SEAL] = _json(seal_of(contents))
    where = f"layer-{config.layer}"
    return Shared(folder, facts, [File(f"{where}/{name}", data) for name, data in contents.items()])


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
