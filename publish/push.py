"""Pushing Lorsas: the files that are sent, and the one commit that takes them to the Hub.

    README.md                   the model card, of all layers there, written anew by each push
    layer-12/config.json        what the Lorsa computes
    layer-12/lorsa.safetensors  its weights
    layer-12/training.json      where it comes from and how good it is

No other file of a run is ever sent.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..dictionaries.attach import require_layer_input
from ..dictionaries.checkpoint import WEIGHTS
from ..dictionaries.checkpoint_files import CONFIG
from ..dictionaries.fetch import local_folder
from ..dictionaries.lorsa.module import Lorsa
from ..errors import PublishError
from ..whole import whole
from .card import card
from .config import PushConfig
from .facts import public_model, read_run, training_facts
from .repository import README, TRAINING, File, Present, Repository, read_present


class Shared(NamedTuple):
    """A Lorsa to share."""

    run: Path
    """Folder of the run"""
    facts: dict[str, Any]
    """Content of training.json"""
    files: list[File]
    """Files to send"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """The result of a push, or of a dry run."""

    repo: str
    """Repository or folder, as given."""
    sent: bool
    """Whether files were sent; false for a dry run."""
    pushed: list[int]
    """Layers of this push."""
    layers: list[int]
    """Layers that are there after it."""
    files: dict[str, int]
    """Size in bytes of every file, by its path in the repository."""
    url: str | None
    """Address on the Hub; None for a folder."""
    commit: str | None
    """Commit of the push on the Hub; None for a folder or a dry run."""
    card: str
    """The model card."""


def push(
    config: PushConfig, *, dry_run: bool = False, report: Callable[[str], None] = lambda text: None
) -> Pushed:
    """Share Lorsas on the Hub, in one commit, or in a folder.

    Args:
        config: the request.
        dry_run: whether to change nothing, there or here; the Hub is only read.
        report: is called with a line of text for each thing that is done.

    Raises:
        CheckpointError: a run holds no Lorsa, or a damaged one.
        PublishError: a run is not finished, two are of one layer, they are of another language
            model than those that are there, or the Hub does not take them.
    """
    shared = sorted(map(_share, config.runs), key=lambda each: int(each.facts["layer"]))
    _require_one_of_each(shared)
    if config.folder is not None:
        files, text, layers = _contents(config, shared, read_present(config.folder))
        if not dry_run:
            _write(config.folder, files)
        url, commit = None, None
    else:
        repository = Repository(config, report)
        if not dry_run:
            repository.prepare()
        files, text, layers = _contents(config, shared, repository.present())
        url = repository.url
        commit = None if dry_run else repository.commit(files, _message(config, shared))
    return Pushed(
        repo=config.repo,
        sent=not dry_run,
        pushed=[each.facts["layer"] for each in shared],
        layers=layers,
        files={file.path: file.n_bytes for file in files},
        url=url,
        commit=commit,
        card=text,
    )


def _share(run: Path) -> Shared:
    """Return the files and facts of a run, after reading all of it."""
    read_run(run)  # an unfinished run has no Lorsa: the error says which of the two it is
    folder = local_folder(run)
    config = Lorsa.from_pretrained(folder).config  # fails here if it is damaged
    if config.layer is None:
        raise PublishError(f"{run} does not say which layer it replaces")
    require_layer_input(config, run, PublishError)
    if not (folder / WEIGHTS).is_file():
        raise PublishError(
            f"{run} is in another tool's format; type: lorsa convert {run} FOLDER, and push that"
        )
    facts = training_facts(folder, config)
    content = json.loads((folder / CONFIG).read_text("utf-8"))
    content["config"]["base_model"] = public_model(config)
    where = f"layer-{config.layer}"
    files = [
        File(f"{where}/{CONFIG}", _json(content)),
        File(f"{where}/{WEIGHTS}", folder / WEIGHTS),
        File(f"{where}/{TRAINING}", _json(facts)),
    ]
    return Shared(folder, facts, files)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _require_one_of_each(shared: list[Shared]) -> None:
    """Raise PublishError if two runs are of one layer."""
    for one, other in pairwise(shared):
        if one.facts["layer"] == other.facts["layer"]:
            raise PublishError(
                f"{one.run} and {other.run} are both of layer {one.facts['layer']}; push one of "
                "them, or each to a --repo or --revision of its own"
            )


def _contents(
    config: PushConfig, shared: list[Shared], present: Present
) -> tuple[list[File], str, list[int]]:
    """Return the files of a push, its card, and the layers that are there with it."""
    known = present.layers | {each.facts["layer"]: each.facts for each in shared}
    models = {facts["model"]["id"]: layer for layer, facts in known.items()}
    if len(models) > 1:
        each = ", ".join(f"layer {layer} is of {model}" for model, layer in models.items())
        raise PublishError(
            f"{config.repo} would hold Lorsas of several language models ({each}); give each its "
            "own --repo"
        )
    layers = sorted(known)
    text = card(
        config.repo if config.folder is None else f"./{config.folder.resolve().name}",
        [known[layer] for layer in layers],
        revision=config.revision,
        license_id=config.license or present.license_id,
    )
    files = [file for each in shared for file in each.files]
    return [*files, File(README, text.encode())], text, layers


def _message(config: PushConfig, shared: list[Shared]) -> str:
    layers = [str(each.facts["layer"]) for each in shared]
    return config.message or f"Lorsa of layer{'s' * (len(layers) > 1)} {', '.join(layers)}"


def _write(folder: Path, files: list[File]) -> None:
    """Write files into a folder, each whole or not at all."""
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            if isinstance(file.content, Path):
                shutil.copyfile(file.content, partial)
            else:
                partial.write_bytes(file.content)
