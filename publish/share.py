"""A run as it is shared: its dictionary under public names, its facts, and the seal of both."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..dictionaries.attach import require_site_read
from ..dictionaries.checkpoint import is_bound, load, save
from ..dictionaries.choices import CONFIG, WEIGHTS
from ..dictionaries.fetch import local_folder
from ..errors import PublishError
from ..evaluate.kept import weights_sha256
from ..seal import SEAL, seal_of
from .facts import folder_of, public_model, read_run, training_facts
from .repository import TRAINING, File


class Shared(NamedTuple):
    """A dictionary to share."""

    run: Path
    """Folder of the run"""
    facts: dict[str, Any]
    """Content of training.json"""
    files: list[File]
    """Files to send, all of one folder"""

    @property
    def folder(self) -> str:
        """Name of the folder in the repository."""
        return folder_of(self.facts)


def share(run: Path, spare: Path) -> Shared:
    """Return the files and facts of a run, after reading all of it.

    Args:
        run: folder of a finished run, or with a saved dictionary.
        spare: folder that is not there; is made for the dictionary, if not a byte of it can stay:
            where a name changes, or nothing binds its files to each other. It is needed until they
            are sent.

    Raises:
        CheckpointError: the run holds no dictionary, or a damaged one.
        PublishError: it is not finished, or its dictionary cannot be shared.
    """
    read_run(run)  # an unfinished run has no weights: the error says which of the two it is
    folder = local_folder(run)
    saved = load(folder)  # fails here if it is damaged
    config = saved.config
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
    where = folder_of(facts)
    return Shared(folder, facts, [File(f"{where}/{name}", data) for name, data in contents.items()])


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
