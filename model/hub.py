"""Where a Lorsa lies: a folder, or a repository of the Hugging Face Hub, fetched to its cache.

Either holds one Lorsa, or one in each of several subfolders, as layer-12. Of a repository nothing
but config.json and the weights of the chosen Lorsa is fetched.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .checkpoint import WEIGHT_FILES, format_of, read_config
from .disk import CONFIG
from .errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""What may be a repository: owner/name."""
MESSAGE_CHARACTERS = 300


def local_folder(
    where: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of this machine that holds a Lorsa; what is on the Hub alone is fetched.

    Args:
        where: a folder; or, as a text and where there is no such folder, owner/name on the Hub.
        revision: branch, tag or commit of a repository; None is its main branch.
        subfolder: of the folder or repository; None takes the Lorsa in it or in its only subfolder
            with one.
        token: of the Hub; None is the one that `hf auth login` or HF_TOKEN left, if any.

    Raises:
        CheckpointError: the Hub cannot be reached, has no such repository or revision, or not for
            this user; or there are Lorsas in several subfolders, which are named.
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
            there = ", ".join(_inner(folder)) or "no Lorsa"
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
    """Tell whether a subfolder is one, and no pattern that others match."""
    return re.fullmatch(r"[\w-][\w .-]*(/[\w-][\w .-]*)*", subfolder) is not None


def _only_one(folder: Path, advice: str, subfolder: str | None) -> str:
    """Return in which subfolder the Lorsa of a folder is, "" for the folder itself."""
    if subfolder is not None:
        return subfolder
    if (folder / CONFIG).exists():
        return ""
    found = _inner(folder)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds several Lorsas, {', '.join(found)}: {advice % found[0]}"
        )
    return found[0] if found else ""


def _inner(folder: Path) -> list[str]:
    """Return the subfolders with a Lorsa, layer-3 before layer-12."""
    found = [path.parent.name for path in folder.glob(f"*/{CONFIG}")]
    return sorted((n for n in found if not n.endswith(".partial")), key=lambda n: (len(n), n))


def _fetch(
    repo: str, revision: str | None, subfolder: str | None, token: str | bool | None
) -> Path:
    """Fetch one Lorsa of a repository; return its folder in the cache."""
    configs = [CONFIG, f"*/{CONFIG}"] if subfolder is None else [f"{subfolder}/{CONFIG}"]
    root = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=configs))
    try:
        inside = _only_one(root, "choose one, as subfolder %s", subfolder)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(root), repo)) from None
    where = f"{inside}/" if inside else ""
    if not (root / inside / CONFIG).is_file():
        raise CheckpointError(
            f"{repo} holds no Lorsa{f' in {inside}' if inside else ''} ({where}{CONFIG} is "
            "missing); look at its files on the Hub"
        )
    kind = format_of(read_config(root / inside))
    assert kind is not None  # or it could not be read
    snapshot_download(
        repo,
        revision=root.name,  # its commit, so that both are of one
        token=token,
        allow_patterns=[where + name for name in WEIGHT_FILES[kind]],
    )
    return root / inside


def hub_problem(repo: str, error: BaseException, revision: str | None = None) -> str:
    """Return in one line what went wrong between this machine and the Hub, and what to do.

    Args:
        repo: owner/name.
        error: that huggingface_hub raised.
        revision: that was asked for.
    """
    errors = errors_behind(error)
    kinds = tuple(type(each) for each in errors)

    def is_a(kind: type[BaseException]) -> bool:
        return any(issubclass(each, kind) for each in kinds)

    if is_a(GatedRepoError):  # a kind of the one after the next
        return f"{repo} is gated; accept its terms on the Hub and run: hf auth login"
    if is_a(RevisionNotFoundError):
        return f"{repo} has no revision {revision or 'main'}; give a branch, tag or commit of it"
    if is_a(RepositoryNotFoundError):
        return f"{repo} is not on the Hub, or is private: check the spelling, or run: hf auth login"
    if is_a(OfflineModeIsEnabled):
        return f"{repo} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub: unset it"
    for each in errors:  # in older versions, what is not in the cache is one without an answer
        if isinstance(each, HfHubHTTPError) and getattr(each, "response", None) is not None:
            return _answer(repo, each)
    if any(_of_the_network(kind) for kind in kinds):
        return f"{repo}: the Hub cannot be reached; connect and try again"
    return f"{repo}: {_one_line(error)}"


def _answer(repo: str, error: HfHubHTTPError) -> str:
    """Return in one line what an answer of the Hub means."""
    status = error.response.status_code
    if status == 401:
        return f"{repo}: the Hub does not accept the token; run: hf auth login, or correct HF_TOKEN"
    if status == 403:
        return f"{repo}: the token may not do this; run hf auth login with one that may"
    if status == 412:
        return f"{repo} was changed meanwhile; run the same command again"
    return f"{repo}: the Hub answered {_one_line(error)}"


def errors_behind(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that led to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _of_the_network(kind: type[BaseException]) -> bool:
    """Tell whether errors of a kind come from the network; huggingface_hub changed its library."""
    libraries = ("httpx", "httpcore", "requests", "urllib3")
    return issubclass(kind, ConnectionError | TimeoutError) or kind.__module__.startswith(libraries)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:MESSAGE_CHARACTERS]
