"""Pushing dictionaries: the files that are sent, and the one commit that takes them there.

    README.md                   the model card, of all that is there, written anew by each push
    layer-12/config.json        what the dictionary computes
    layer-12/lorsa.safetensors  its weights
    layer-12/training.json      where it comes from and how good it is
    layer-12/seal.json          sizes and checksums of these three

A Lorsa's folder is layer-12, a transcoder's 12.mlp, and an SAE's 12.resid_out. No other file of a
run is ever sent.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ..errors import PublishError
from ..whole import lock_folder, write_whole
from .card import card
from .config import PushConfig
from .facts import by_layer, kind_of, place_in_words
from .replace import put_all_back, replaced
from .repository import README, File, Present, Repository, read_present
from .share import Shared, share


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
    folders: list[str]
    """Folders that are there after it, layer by layer."""
    files: dict[str, int]
    """Size in bytes of every file, by its path in the repository."""
    url: str | None
    """Address on the Hub; None for a folder."""
    commit: str | None
    """Commit of the push on the Hub; None for a folder or a dry run."""
    card: str
    """The model card."""


class Contents(NamedTuple):
    """The files of a push."""

    files: list[File]
    card: str
    """The model card, which is one of them"""
    facts: dict[str, dict[str, Any]]
    """training.json of each dictionary that is there after it, by its folder"""


def push(
    config: PushConfig, *, dry_run: bool = False, report: Callable[[str], None] = lambda text: None
) -> Pushed:
    """Share dictionaries on the Hub, in one commit, or in a folder.

    Args:
        config: the request.
        dry_run: whether to change nothing, there or here; the Hub is only read.
        report: is called with a line of text for each thing that is done.

    Raises:
        CheckpointError: a run holds no dictionary, or a damaged one.
        PublishError: a run is not finished, two are of one place, they are of another language
            model than those that are there, or the Hub does not take them.
    """
    with TemporaryDirectory(prefix="lorsa-push-") as spare:
        shared = [share(run, Path(spare, str(n))) for n, run in enumerate(config.runs)]
        shared.sort(key=lambda each: by_layer(each.facts))
        _require_one_of_each(shared)
        if config.folder is not None:
            return _to_folder(config, config.folder, shared, dry_run=dry_run, report=report)
        return _to_hub(config, shared, dry_run=dry_run, report=report)


def _to_folder(
    config: PushConfig,
    folder: Path,
    shared: list[Shared],
    *,
    dry_run: bool,
    report: Callable[[str], None],
) -> Pushed:
    if dry_run:
        return _pushed(config, shared, _contents(config, shared, read_present(folder), report))
    with _locked(folder):
        put_all_back(folder)
        contents = _contents(config, shared, read_present(folder), report)
        _write(folder, shared, contents.card)
    return _pushed(config, shared, contents, sent=True)


def _to_hub(
    config: PushConfig, shared: list[Shared], *, dry_run: bool, report: Callable[[str], None]
) -> Pushed:
    repository = Repository(config, report)
    if not dry_run:
        repository.prepare()
    contents = _contents(config, shared, repository.present(), report)
    commit = None
    if not dry_run:
        commit = repository.commit(contents.files, _message(config, shared))
    return _pushed(config, shared, contents, sent=not dry_run, url=repository.url, commit=commit)


def _pushed(
    config: PushConfig,
    shared: list[Shared],
    contents: Contents,
    *,
    sent: bool = False,
    url: str | None = None,
    commit: str | None = None,
) -> Pushed:
    return Pushed(
        repo=config.repo,
        sent=sent,
        pushed=_layers(each.facts for each in shared),
        layers=_layers(contents.facts.values()),
        folders=list(contents.facts),
        files={file.path: file.n_bytes for file in contents.files},
        url=url,
        commit=commit,
        card=contents.card,
    )


def _layers(some: Iterable[dict[str, Any]]) -> list[int]:
    return sorted({facts["layer"] for facts in some})


def _require_one_of_each(shared: list[Shared]) -> None:
    """Raise PublishError if two runs are of one place."""
    for one, other in pairwise(shared):
        if one.folder == other.folder:
            raise PublishError(
                f"{one.run} and {other.run} are both of {place_in_words(one.facts)}; push one of "
                "them, or each to a --repo or --revision of its own"
            )


def _contents(
    config: PushConfig, shared: list[Shared], present: Present, report: Callable[[str], None]
) -> Contents:
    """Return what a push sends, and what is there with it."""
    known = present.folders | {each.folder: each.facts for each in shared}
    known = dict(sorted(known.items(), key=lambda item: by_layer(item[1])))
    models = {facts["model"]["id"]: place_in_words(facts) for facts in known.values()}
    if len(models) > 1:
        each = ", ".join(f"{where} is of {model}" for model, where in models.items())
        raise PublishError(
            f"{config.repo} would hold dictionaries of several language models ({each}); give each "
            "its own --repo"
        )
    if config.license is None and present.license_id is not None:
        report(f"the license stays {present.license_id}, as the {README} there says")
    text = card(
        config.repo if config.folder is None else f"./{config.folder.resolve().name}",
        list(known.values()),
        revision=config.revision,
        license_id=config.license or present.license_id,
    )
    files = [file for each in shared for file in each.files]
    return Contents([*files, File(README, text.encode())], text, known)


def _message(config: PushConfig, shared: list[Shared]) -> str:
    if config.message:
        return config.message
    if any(kind_of(each.facts) != "lorsa" for each in shared):
        return ", ".join(each.folder for each in shared)
    layers = [str(each.facts["layer"]) for each in shared]
    return f"Lorsa of layer{'s' * (len(layers) > 1)} {', '.join(layers)}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a folder, made if need be, from other pushes; its failures are a line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock_folder(folder)
        if handle is None:
            raise PublishError(f"another process pushes to {folder}; run the same command again")
        try:
            yield
        finally:
            os.close(handle)
    except OSError as error:
        raise PublishError(f"{folder} cannot be written ({error})") from None


def _write(folder: Path, shared: list[Shared], text: str) -> None:
    """Put each dictionary in the place of what was there, as one, and the card after them."""
    for each in shared:
        with replaced(folder / each.folder) as partial:
            for file in each.files:
                path = partial / Path(file.path).name
                path.unlink(missing_ok=True)  # which is a link to the file that is there
                if isinstance(file.content, Path):
                    shutil.copyfile(file.content, path)
                else:
                    path.write_bytes(file.content)
    write_whole(folder / README, text)
