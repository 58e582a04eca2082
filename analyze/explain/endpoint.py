"""Endpoint of a language model's server, and the key for it."""

import ipaddress
import os
from urllib.parse import SplitResult, parse_qsl, urlsplit

from ...errors import AnalyzeError

KEYS = ("LORSA_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key; the first that is set counts, even if empty."""


SECRET_WORDS = ("key", "token", "secret", "sig", "code", "pass", "auth")
"""Words in the name of a query's field whose value is a secret."""


class EndpointError(AnalyzeError):
    """The endpoint does not work: no request would succeed."""


def endpoint_url(endpoint: str) -> SplitResult:
    """Return the parts of an endpoint.

    Raises:
        ValueError: it is no URL of a server, or has a password in it.
    """
    wanted = "allowed: a URL such as http://127.0.0.1:8080/v1"
    try:
        url = urlsplit(endpoint)
        port = url.port
    except ValueError as error:
        raise ValueError(f"endpoint cannot be read ({error}); {wanted}") from None
    if url.username is not None or url.password is not None:
        raise ValueError(f"endpoint has a user or password in it; set {KEYS[0]} instead")
    odd = not endpoint.isascii() or not endpoint.isprintable() or " " in endpoint
    if url.scheme not in ("http", "https") or not url.hostname or port == 0 or odd:
        raise ValueError(f"endpoint is {one_line(endpoint, 100)!r}; {wanted}")
    return url


def endpoint_name(endpoint: str) -> str:
    """Return an endpoint as messages show it: without its query, which may hold a secret."""
    url = endpoint_url(endpoint)
    return url._replace(path=_base(url), query="", fragment="").geturl()


def _base(url: SplitResult) -> str:
    return url.path.rstrip("/").removesuffix("/chat/completions")


def request_url(endpoint: str) -> str:
    """Return where requests go; the endpoint may name it itself."""
    url = endpoint_url(endpoint)
    return url._replace(path=_base(url) + "/chat/completions", fragment="").geturl()


def url_secrets(endpoint: str) -> list[str]:
    """Return what may be a secret in the query of an endpoint, as in ?api-key=..."""
    pairs = parse_qsl(endpoint_url(endpoint).query)
    return [
        value
        for name, value in pairs
        if any(word in name.lower() for word in SECRET_WORDS) and _may_be_key(value)
    ]


def _may_be_key(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def is_loopback(endpoint: str) -> bool:
    """Return whether an endpoint is on this machine."""
    host = endpoint_url(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def find_key() -> tuple[str | None, str | None]:
    """Return the key and the variable that it is from; None if there is none.

    Raises:
        EndpointError: it cannot be a key.
    """
    name = next((name for name in KEYS if name in os.environ), None)
    key = os.environ[name].strip() if name else ""
    if not key:
        return None, None
    if not _may_be_key(key):
        raise EndpointError(f"{name} holds characters that no key has; set it again")
    return key, name


def one_line(text: str, longest: int) -> str:
    """Return a foreign text as one printable line of at most `longest` characters."""
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return line if len(line) <= longest else line[: longest - 1] + "…"
