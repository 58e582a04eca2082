"""A repository on the Hub, or a folder: its content before a push, and a commit to it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token, metadata_load, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import PublishError, unreadable
from ..hub import hub_problem
from ..reading import read_json
from ..seal import SEAL, first_damage
from ..store.care.info import format_bytes
from ..version import __version__
from ..whole import PARTIAL
from .config import PushConfig
from .facts import FACTS_VERSIONS, FORMAT, folder_of, kind_of, wrong_fact

README = "README.md"
TRAINING = "training.json"
READ = (README, f"*/{TRAINING}", f"*/{SEAL}")
"""Patterns of the files that a push reads before it writes."""


class File(NamedTuple):
    """A file to share."""

    path: str
    """Path in the repository"""
    content: bytes | Path
    """Content, or a file that holds it"""

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        content = self.content
        return content.stat().st_size if isinstance(content, Path) else len(content)


class Present(NamedTuple):
    """The content of a repository or folder before a push."""

    folders: dict[str, dict[str, Any]]
    """training.json of each dictionary, by its folder"""
    license_id: str | None
    """License in the card's front matter"""


def read_present(folder: Path) -> Present:
    """Return the content of a folder with a repository's files.

    Raises:
        PublishError: its card is of another library, or a file cannot be read.
    """
    paths = sorted(folder.glob(READ[1]))
    folders = [_read_facts(path) for path in paths if path.parent.suffix != PARTIAL]
    metadata: dict[str, Any] = {}
    if (folder / README).exists():
        try:
            metadata = metadata_load(folder / README) or {}
        except Exception as error:  # of YAML's parser
            reason = " ".join(str(error).split())
            raise PublishError(f"the {README} there cannot be read ({reason}); repair it") from None
    if (library := metadata.get("library_name", "lorsa")) != "lorsa":
        raise PublishError(
            f"the {README} there is of the library {library}; give these a --repo of their own"
        )
    license_id = metadata.get("license")
    found = {folder_of(facts): facts for facts in folders}
    return Present(found, license_id if isinstance(license_id, str) else None)


def _read_facts(path: Path) -> dict[str, Any]:
    """Return a training.json; PublishError if it cannot be read."""
    name = f"{path.parent.name}/{path.name}"
    try:
        if (problem := first_damage(path.parent, (TRAINING,))) is not None:
            raise PublishError(f"{problem}; restore it from a copy, or push it again")
        facts = read_json(path)
        kinds = FACTS_VERSIONS.get(facts["schema_version"], ())
        known = facts["format"] == FORMAT and kind_of(facts) in kinds
        is_whole = known and path.parent.name == folder_of(facts)
    except OSError as error:
        raise PublishError(unreadable(f"the {name} there", error)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishError(
            f"the {name} there cannot be read ({error}); delete that folder"
        ) from None
    if not known or not is_whole:
        raise PublishError(
            f"the {name} there is of another version of lorsa, or in another's place: push with "
            "the version that wrote it, or delete that folder"
        )
    if (wrong := wrong_fact(facts)) is not None:
        raise PublishError(f"the {name} there cannot be read ({wrong}); delete that folder")
    return dict(facts)


class Repository:
    """A repository on the Hub that is pushed to."""

    def __init__(self, config: PushConfig, report: Callable[[str], None]) -> None:
        """Find the commit on the Hub to go on from.

        Raises:
            PublishError: it cannot be reached, or does not accept the token.
        """
        self._config, self._report = config, report
        self._api = HfApi(library_name="lorsa", library_version=__version__)
        self._head: str | None
        """Commit that the push goes on from; None if there is no repository."""
        self._has_branch = True
        with self._errors_in_a_line():
            self._find_head()

    @property
    def url(self) -> str:
        """Address of the branch on the Hub."""
        branch = "" if self._config.revision is None else f"/tree/{self._config.revision}"
        return f"{self._api.endpoint}/{self._config.repo}{branch}"

    def prepare(self) -> None:
        """Create the repository and the branch, if they are not there.

        Raises:
            PublishError: there is no token, or it may not write.
        """
        repo, revision = self._config.repo, self._config.revision
        if get_token() is None:
            raise PublishError(
                "there is no token of the Hub; run: hf auth login, or set HF_TOKEN to one that may "
                "write"
            )
        with self._errors_in_a_line():
            if self._head is None:
                self._api.create_repo(repo, private=self._config.private)
                self._report(f"made {repo}{', private' * self._config.private}")
            elif self._config.private:
                self._report(f"{repo} is there already and stays as public or private as it is")
            if revision is not None and not self._has_branch:
                self._api.create_branch(repo, branch=revision, exist_ok=True)
            self._find_head()

    def present(self) -> Present:
        """Return the content of the branch.

        Raises:
            PublishError: a file cannot be read, see `read_present`, or the Hub does not give it.
        """
        repo = self._config.repo
        if self._head is None:
            return Present({}, None)
        with self._errors_in_a_line():
            names = self._api.list_repo_files(repo, revision=self._head)
            if not any(fnmatch(name, pattern) for name in names for pattern in READ):
                return Present({}, None)
            root = snapshot_download(repo, revision=self._head, allow_patterns=list(READ))
        return read_present(Path(root))

    def commit(self, files: Sequence[File], message: str) -> str:
        """Send files in one commit; return it.

        Raises:
            PublishError: the Hub does not take them, or the repository has changed meanwhile.
        """
        n_bytes = sum(file.n_bytes for file in files)
        self._report(f"sending {len(files)} files, {format_bytes(n_bytes)}")
        with self._errors_in_a_line():
            info = self._api.create_commit(
                self._config.repo,
                [CommitOperationAdd(file.path, file.content) for file in files],
                commit_message=message,
                revision=self._config.revision,
                parent_commit=self._head,
            )
        return str(info.oid)

    def _find_head(self) -> None:
        """Find the commit to go on from."""
        repo, revision = self._config.repo, self._config.revision
        try:
            self._head = self._api.model_info(repo, revision=revision).sha
            self._has_branch = True
        except RevisionNotFoundError:
            self._head, self._has_branch = self._api.model_info(repo).sha, False
        except GatedRepoError:  # a kind of the next
            raise
        except RepositoryNotFoundError:
            self._head, self._has_branch = None, False

    @contextmanager
    def _errors_in_a_line(self) -> Iterator[None]:
        """Raise whatever huggingface_hub raises as a PublishError of one line."""
        try:
            yield
        except Exception as error:  # the HTTP library, and so its errors, change with its version
            problem = hub_problem(self._config.repo, error, self._config.revision)
            raise PublishError(problem) from error
