"""The Hugging Face Hub: names of repositories, and its failures in one line."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Pattern of a repository: owner/name."""

MESSAGE_CHARACTERS = 300
HUB_TIMEOUT_S = 10
"""Seconds to wait for the Hub's first answer, instead of transformers' many retries."""


def gated(what: str) -> str:
    """Return in one line what to do about a repository whose terms were not accepted.

    Args:
        what: the repository, or "model" or "data" and its name.
    """
    return f"{what} is gated; accept its terms on the Hub and run: hf auth login"


def hub_problem(repo: str, error: BaseException, revision: str | None = None) -> str:
    """Return one line that says what failed between this machine and the Hub, and what to do.

    Args:
        repo: repository, owner/name.
        error: error that huggingface_hub raised.
        revision: revision that was asked for.
    """
    from huggingface_hub.errors import (  # here, so that a config with a name imports none
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    errors = errors_behind(error)
    kinds = tuple(type(each) for each in errors)

    def is_a(kind: type[BaseException]) -> bool:
        return any(issubclass(each, kind) for each in kinds)

    if is_a(GatedRepoError):  # a kind of the one after the next
        return gated(repo)
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


def _answer(repo: str, error: "HfHubHTTPError") -> str:
    """Return one line that says what an answer of the Hub means, and what to do."""
    status = error.response.status_code
    if status == 401:
        return f"{repo}: the Hub does not accept the token; run: hf auth login, or correct HF_TOKEN"
    if status == 403:
        return f"{repo}: the token may not do this; run hf auth login with one that may"
    if status == 412:
        return f"{repo} was changed meanwhile; run the same command again"
    return f"{repo}: the Hub answered {_one_line(error)}"


def errors_behind(error: BaseException | None) -> list[BaseException]:
    """Return an error and its causes, the error first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _of_the_network(kind: type[BaseException]) -> bool:
    """Whether a kind of error comes from the network; huggingface_hub changed its library."""
    libraries = ("httpx", "httpcore", "requests", "urllib3")
    return issubclass(kind, ConnectionError | TimeoutError) or kind.__module__.startswith(libraries)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:MESSAGE_CHARACTERS]
