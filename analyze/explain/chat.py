"""Questions to a server that speaks OpenAI's protocol.

    POST ENDPOINT/chat/completions   {"model": ..., "messages": [{"role": "user", "content": ...}]}
    -> {"choices": [{"message": {"content": ...}}], "usage": {"prompt_tokens": ..., ...}}

The key is read from the environment and goes into the header Authorization, nowhere else. A request
that a busy server turns down (429, 5xx) is retried later. Redirects are not followed, as they would
take the key elsewhere.
"""

import http.client
import json
import math
import threading
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, NoReturn

from ...errors import AnalyzeError
from ...version import __version__
from .endpoint import (
    KEYS,
    EndpointError,
    endpoint_name,
    find_key,
    is_loopback,
    one_line,
    request_url,
)

CHARS_PER_TOKEN = 4
BUSY_TRIES = 6
"""Attempts of a request that 429 or 5xx answers."""
LONGEST_BACKOFF_S = 60.0
LONGEST_RETRY_AFTER_S = 300.0
LARGEST_BODY = 4 * 2**20
KEPT = "what was answered is kept, the same command goes on"


class ReplyError(AnalyzeError):
    """One request got no usable reply; others may."""


class StoppedError(Exception):
    """Stop was asked for while waiting for a turn."""


class Reply(NamedTuple):
    """Reply of a model."""

    text: str
    cut: bool
    """Whether it was cut at max_tokens"""


class _RetryError(Exception):
    """Request that may be retried."""

    def __init__(self, reason: str, *, tries: int, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.tries = tries
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Return no request: a redirect is an answer without success."""


def n_tokens(text: str) -> int:
    """Return the approximate number of tokens of a text, a fourth of its characters."""
    return math.ceil(len(text) / CHARS_PER_TOKEN)


class Chat:
    """A model behind an endpoint; may be asked by several threads at once."""

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        max_tokens: int,
        timeout_s: float,
        requests_per_minute: float | None = None,
        stopped: threading.Event | None = None,
        backoff_s: float = 1.0,
    ) -> None:
        """Prepare requests; nothing is sent.

        Args:
            endpoint: URL to which /chat/completions is added.
            model: its name there.
            max_tokens: tokens of a reply, at most.
            timeout_s: seconds without a byte after which a request fails.
            requests_per_minute: limit of requests; None sets none.
            stopped: ends the waiting.
            backoff_s: seconds before the first retry; doubled each time.

        Raises:
            ValueError: endpoint is no URL of a server.
            EndpointError: the key cannot be one.
        """
        self.name = endpoint_name(endpoint)
        self.model = model
        self._url = request_url(endpoint)
        self._key, _ = find_key()
        self._timeout_s = timeout_s
        self._extra: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
        proxies: dict[str, str] | None = {} if is_loopback(endpoint) else None
        proxy = urllib.request.ProxyHandler(proxies)
        self._opener = urllib.request.build_opener(proxy, _NoRedirect)
        self._stopped = stopped or threading.Event()
        self._interval_s = 0.0 if requests_per_minute is None else 60 / requests_per_minute
        self._backoff_s = backoff_s
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._answered = False
        self.n_requests = 0
        self.tokens_in = 0
        self.tokens_out = 0

    def ask(self, prompt: str) -> Reply:
        """Return the model's reply to a prompt.

        Raises:
            ReplyError: the server refuses this prompt.
            EndpointError: the server refuses all, or has not answered after several tries.
            StoppedError: `stopped` was set while waiting.
        """
        tries = 0
        while True:
            self._wait_turn()
            try:
                return self._reply(prompt, self._send(prompt))
            except _RetryError as retry:
                tries += 1
                if tries >= retry.tries:
                    times = f", {tries} times" if tries > 1 else ""
                    raise EndpointError(f"{self.name} {retry}{times}; {KEPT}") from None
                self._pause(retry.wait_s, tries)

    def _wait_turn(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                wait = self._next_at - now
                if wait <= 0 and not self._stopped.is_set():
                    self._next_at = now + self._interval_s
                    self.n_requests += 1
                    return
            if self._stopped.wait(max(wait, 0)):
                raise StoppedError

    def _pause(self, wait_s: float, tries: int) -> None:
        """Delay all requests: as long as the server asks for, and longer each time."""
        wait_s = max(wait_s, min(self._backoff_s * 2 ** (tries - 1), LONGEST_BACKOFF_S))
        if wait_s > LONGEST_RETRY_AFTER_S:
            raise EndpointError(f"{self.name} asks to wait {wait_s:,.0f} s; {KEPT} then")
        with self._lock:
            self._next_at = max(self._next_at, time.monotonic() + wait_s)

    def _send(self, prompt: str) -> str:
        """Return the body of a good answer."""
        content = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        extra = dict(self._extra)
        headers = {"Content-Type": "application/json", "User-Agent": f"lorsa/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(content | extra).encode()
        request = urllib.request.Request(self._url, data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                body = self._text(response.read(LARGEST_BODY))
        except urllib.error.HTTPError as error:
            self._answered = True
            self._refused(error, extra)
        except (OSError, http.client.HTTPException) as error:
            raise _RetryError(self._unreached(error), tries=3 if self._answered else 1) from None
        self._answered = True
        return body

    def _text(self, body: bytes) -> str:
        text = body.decode("utf-8", "replace")
        return text.replace(self._key, "[key]") if self._key else text

    def _unreached(self, error: Exception) -> str:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return f"does not answer within {self._timeout_s:g} s; see --timeout"
        words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return f"cannot be reached ({one_line(str(words), 120)}); is it running, is the URL right?"

    def _refused(self, error: urllib.error.HTTPError, extra: dict[str, Any]) -> NoReturn:
        """Raise the error that an answer other than success means."""
        try:
            with error:
                said = _message(self._text(error.read(LARGEST_BODY)))
        except (OSError, http.client.HTTPException):
            said = "nothing more"
        status, reason = error.code, f"answers {error.code} ({said})"
        if status in (408, 429) or status >= 500:
            wait_s = _retry_after(error.headers.get("Retry-After"))
            raise _RetryError(reason, tries=BUSY_TRIES, wait_s=wait_s)
        if status == 400 and (names := [name for name in extra if name in said]):
            for name in names:  # some models know it under another name, or not at all
                self._extra.pop(name, None)
            raise _RetryError(reason, tries=2 + len(extra))
        if status in (400, 413, 422):
            raise ReplyError(reason)
        raise EndpointError(f"{self.name} {reason}; {self._advice(status)}; {KEPT}")

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return "set another key" if self._key else f"set a key in {KEYS[0]}"
        if status == 404:
            return f"is there a model {self.model!r}, and should the URL end in /v1?"
        if status < 400:
            return "it sends requests elsewhere: give the address that it answers under"
        return "is it an OpenAI-compatible server?"

    def _reply(self, prompt: str, body: str) -> Reply:
        try:
            content = json.loads(body)
            choice = content["choices"][0]
            text = choice["message"]["content"] or ""
            if isinstance(text, list):  # in parts
                text = "".join(part.get("text", "") for part in text)
            reply = Reply(str(text), choice.get("finish_reason") == "length")
        except (ValueError, LookupError, TypeError, AttributeError):
            what = _message(body)
            reason = f"is no OpenAI-compatible server: it answers {what}"
            raise _RetryError(reason, tries=2) from None
        usage = content.get("usage")
        self._count(usage if isinstance(usage, dict) else {}, prompt, reply.text)
        return reply

    def _count(self, usage: dict[str, Any], prompt: str, text: str) -> None:
        sent, got = usage.get("prompt_tokens"), usage.get("completion_tokens")
        with self._lock:
            self.tokens_in += sent if isinstance(sent, int) else n_tokens(prompt)
            self.tokens_out += got if isinstance(got, int) else n_tokens(text)


def _message(body: str) -> str:
    """Return the message in a body that is no reply, in a line."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body
    while isinstance(found, dict):
        names = ("error", "message", "detail")
        found = next((found[name] for name in names if name in found), str(found))
    words = one_line(str(found), 150)
    return "HTML" if words.startswith("<") else words or "nothing"


def _retry_after(header: str | None) -> float:
    """Return the seconds of a Retry-After header, which has them or a date; 0 without one."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if math.isfinite(seconds) else 0.0
