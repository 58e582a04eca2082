"""The folder of a dictionary here: as given, or fetched from the Hugging Face Hub.

A folder or repository holds one, or one in each of several subfolders, as layer-12. Nothing
of a repository but config.json and the weights of the chosen one is fetched, into the Hub's
cache.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import CheckpointError
from ..hub import HUB_ID, hub_problem
from .checkpoint import WEIGHTS_BY_FORMAT, format_of, read_config
from .choices import CONFIG


def local_folder(
    where: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder here that holds a dictionary; what is on the Hub alone is fetched.

    Args:
        where: a folder; or, as a text and where there is no such folder, owner/name on the Hub.
        revision: branch, tag or commit of a repository; None is its main branch.
        subfolder: folder inside, as layer-12; None takes the one in `where` itself, or in its
            only subfolder with one.
        token: access token of the Hub; None is the one that `hf auth login` or HF_TOKEN left.

    Raises:
        CheckpointError: the Hub cannot be reached, has no such repository or revision, or not for
            this user; or there are some in several subfolders, which are named.
        ValueError: a revision of a folder, or a subfolder that is not inside.
    """
    if subfolder is not None and not _is_inside(subfolder):
        raise ValueError(f"subfolder is {subfolder!r}; allowed: a folder inside, as layer-12")
    folder = Path(where)
    if isinstance(where, Path) or folder.exists() or not HUB_ID.fullmatch(where):
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}; {where} is a folder, and only repositories on the Hub "
                "have revisions: leave it out"
            )
        inside = _only_one(folder, f"give one of these folders, as {folder}/%s", subfolder)
        if folder.is_dir() and not (folder / inside).is_dir():
            there = ", ".join(_inner(folder)) or "no dictionary"
            raise CheckpointError(f"{folder} has no folder {inside}; it holds {there}")
        return folder / inside
    try:
        return _fetch(where, revision, subfolder, token)
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP library, and so its errors, change with the Hub's version
        raise CheckpointError(
            f"{where} is no folder here; {hub_problem(where, error, revision)}"
        ) from error


def _is_inside(subfolder: str) -> bool:
    """Return whether a text names a subfolder, and is no pattern that others match."""
    return re.fullmatch(r"[\w-][\w .-]*(/[\w-][\w .-]*)*", subfolder) is not None


def _only_one(folder: Path, advice: str, subfolder: str | None) -> str:
    """Return the subfolder that holds a folder's dictionary, "" for the folder itself."""
    if subfolder is not None:
        return subfolder
    if (folder / CONFIG).exists():
        return ""
    found = _inner(folder)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds several dictionaries, {', '.join(found)}: {advice % found[0]}"
        )
    return found[0] if found else ""


def _inner(folder: Path) -> list[str]:
    """Return the subfolders with a dictionary, layer-3 before layer-12."""
    found = [path.parent.name for path in folder.glob(f"*/{CONFIG}")]
    return sorted((n for n in found if not n.endswith(".partial")), key=lambda n: (len(n), n))


def _fetch(
    repo: str, revision: str | None, subfolder: str | None, token: str | bool | None
) -> Path:
    """Fetch one dictionary of a repository; return its folder in the cache."""
    configs = [CONFIG, f"*/{CONFIG}"] if subfolder is None else [f"{subfolder}/{CONFIG}"]
    root = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=configs))
    try:
        inside = _only_one(root, "choose one, as subfolder %s", subfolder)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(root), repo)) from None
    where = f"{inside}/" if inside else ""
    if not (root / inside / CONFIG).is_file():
        raise CheckpointError(
            f"{repo} holds no dictionary{f' in {inside}' if inside else ''} ({where}{CONFIG} is "
            "missing); look at its files on the Hub"
        )
    kind = format_of(read_config(root / inside))
    assert kind is not None  # or it could not be read
    snapshot_download(
        repo,
        revision=root.name,  # its commit, so that both are of one
        token=token,
        allow_patterns=[where + name for name in WEIGHTS_BY_FORMAT[kind]],
    )
    return root / inside
