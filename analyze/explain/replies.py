"""Bodies that servers answer with: replies of a model, refusals, or neither.

    {"choices": [{"message": {"content": "..."}, "finish_reason": "stop"}], "usage": {...}}
    {"error": {"message": "...", "code": 429}}

A body of status 200 may be a refusal too. Then the status is the one that it names.
"""

from typing import Any, NamedTuple

from ...reading import parse_json
from .endpoint import one_line

MOST_COUNTED = 10**9
"""Tokens of one request, above which a server's count is not believed."""
STATUS_WORDS = (
    (429, ("rate_limit", "ratelimit", "rate limit", "quota", "exhausted", "too many", "too_many")),
    (401, ("auth", "api_key", "api key")),
    (403, ("permission", "moderation", "forbidden")),
    (503, ("overloaded", "unavailable", "timeout", "server", "internal")),
    (400, ("invalid", "bad", "context", "filter", "policy", "safety")),
)
"""Words that stand for a status in the type or code of an error, the first that fits."""


class Reply(NamedTuple):
    """Reply of a model."""

    text: str
    """Words of the model; empty where there are none, as in that of a filter"""
    ended: str | None = None
    """Why it ended, if not of itself"""
    tokens_in: int | None = None
    """Tokens of the prompt, by the server's count"""
    tokens_out: int | None = None
    """Tokens of the reply, by the server's count"""


class Refusal(NamedTuple):
    """Refusal of a request."""

    status: int | None
    """HTTP status, None if the refusal does not tell"""
    said: str
    """Reason in a line, cut to a length"""


def read_body(body: str) -> Reply | Refusal | None:
    """Return what the body of an answer with status 200 is; None if it is of another protocol."""
    content = _parsed(body)
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if not isinstance(content, dict):
        return None
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    if not isinstance(choice, dict):
        return None
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text = _text(message.get("content")) or ""
    whole = content if content.get("object") == "error" else None
    error = content.get("error") or choice.get("error") or whole
    if error and not text:
        return Refusal(_status(error, content), said(error))
    if not isinstance(choices, list):
        return None
    ended = choice.get("finish_reason")
    if not text and isinstance(message.get("refusal"), str):
        ended = message["refusal"]
    ended = None if ended in (None, "stop") else one_line(str(ended), 60)
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(text, ended, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def said(found: Any) -> str:
    """Return the message in what is no reply, a body or a part of one, in a line."""
    if isinstance(found, str):
        parsed = _parsed(found)
        found = found if parsed is None else parsed
    while isinstance(found, dict):
        names = ("error", "message", "detail")
        found = next((found[name] for name in names if name in found), str(found))
    words = one_line(str(found), 150)
    return "HTML" if words.startswith("<") else words or "nothing"


def _parsed(body: str) -> Any:
    """Return what JSON says; None if it is none, or too deep."""
    try:
        return parse_json(body, constant=float)
    except ValueError:
        return None


def _text(content: Any) -> str | None:
    """Return the words of a message, which may be in parts; None if it has none."""
    if isinstance(content, list):
        found = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in found if isinstance(part, str))
    return content if isinstance(content, str) else None


def _count(usage: dict[str, Any], name: str) -> int | None:
    n = usage.get(name)
    known = isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_COUNTED
    return n if known else None


def _status(error: Any, content: dict[str, Any]) -> int | None:
    """Return the status that an error names by a number, or else by a word."""
    fields = error if isinstance(error, dict) else {}
    named = [fields.get(name) for name in ("code", "status", "type")]
    named += [content.get(name) for name in ("code", "status")]
    for value in named:
        number = str(value)
        if len(number) == 3 and number.isdecimal() and 400 <= int(number) < 600:
            return int(number)
    words = " ".join(str(value).lower() for value in named if isinstance(value, str))
    return next((status for status, known in STATUS_WORDS if any(w in words for w in known)), None)
