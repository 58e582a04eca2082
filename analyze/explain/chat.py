"""Questions to a server that speaks OpenAI's protocol.

    POST ENDPOINT/chat/completions   {"model": ..., "messages": [{"role": "user", "content": ...}]}
    -> {"choices": [{"message": {"content": ...}}], "usage": {"prompt_tokens": ..., ...}}

The key is read from the environment and goes into the header Authorization, nowhere else. A request
that a busy server turns down (429, 5xx) is retried later. Redirects are not followed, as they would
take the key elsewhere. Once a server has answered well, what it says to one prompt is held against
that prompt alone.
"""

import http.client
import json
import math
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, NoReturn, TypeVar

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
    url_secrets,
)
from .replies import Refusal, Reply, read_body, said
from .secrets import Secrets
from .settings import Settings, without_refused

CHARS_PER_TOKEN = 4
BUSY_TRIES = 6
"""Attempts of a request that 429 or 5xx answers."""
LONGEST_BACKOFF_S = 60.0
LONGEST_RETRY_AFTER_S = 300.0
LARGEST_BODY = 4 * 2**20
OF_ALL = (401, 402)
"""Statuses that the next prompt would get too: no valid key, no money."""
KEPT = "what was answered is kept, the same command goes on"

T = TypeVar("T")


class ReplyError(AnalyzeError):
    """One request got no usable reply; others may."""


class StoppedError(Exception):
    """Stop was asked for while waiting for a turn."""


class _Answer(NamedTuple):
    """Answer of a server, whatever it says."""

    status: int
    body: str
    retry_after: str | None


class _RetryError(Exception):
    """Request that may be retried later."""

    def __init__(
        self, reason: str, *, tries: int, wait_s: float = 0.0, of_prompt: bool = True
    ) -> None:
        super().__init__(reason)
        self.tries = tries
        self.wait_s = wait_s
        self.of_prompt = of_prompt
        """Whether the prompt may be the reason"""


class _SettingsError(Exception):
    """Request that is refused for its settings."""

    def __init__(self, left: dict[str, Any]) -> None:
        super().__init__()
        self.left = left
        """Settings to send it with instead"""


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
            timeout_s: seconds after which a request without a whole reply fails.
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
        self._secrets = Secrets([*([self._key] if self._key else []), *url_secrets(endpoint)])
        self._timeout_s = timeout_s
        self._settings = Settings(max_tokens)
        proxies: dict[str, str] | None = {} if is_loopback(endpoint) else None
        proxy = urllib.request.ProxyHandler(proxies)
        self._opener = urllib.request.build_opener(proxy, _NoRedirect)
        self._stopped = stopped or threading.Event()
        self._interval_s = 0.0 if requests_per_minute is None else 60 / requests_per_minute
        self._backoff_s = backoff_s
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._answered = False
        self._answered_well = False
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
        settings = self._settings.of_prompt()
        tries = 0
        while True:
            self._wait_turn()
            try:
                reply = self._once(prompt, settings)
            except _SettingsError as refused:
                settings = refused.left
            except _RetryError as retry:
                tries += 1
                if tries >= retry.tries:
                    times = f", {tries} times" if tries > 1 else ""
                    self._fail(f"{retry}{times}", of_prompt=retry.of_prompt and self._answered_well)
                self._pause(retry.wait_s, tries)
            else:
                self._settings.learn(settings)
                self._count(reply, prompt)
                return reply._replace(text=self.cut(reply.text))

    def cut(self, text: str) -> str:
        """Return a text without the key, however it is spelled there."""
        return self._secrets.cut(text)

    def _fail(self, reason: str, *, of_prompt: bool) -> NoReturn:
        """Raise the error of one prompt, or of all."""
        if of_prompt:
            raise ReplyError(self.cut(reason))
        raise EndpointError(self.cut(f"{self.name} {reason}; {KEPT}"))

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
            self._fail(f"asks to wait {wait_s:,.0f} s", of_prompt=False)
        with self._lock:
            self._next_at = max(self._next_at, time.monotonic() + wait_s)

    def _once(self, prompt: str, settings: dict[str, Any]) -> Reply:
        """Send a prompt and return its reply, or raise what the answer means."""
        message = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        data = json.dumps(message | settings).encode()
        try:
            answer = _within(self._timeout_s, lambda: self._post(data))
        except (OSError, http.client.HTTPException) as error:
            reached = not isinstance(error, urllib.error.URLError)
            tries = 3 if self._answered else 1
            raise _RetryError(self._unreached(error), tries=tries, of_prompt=reached) from None
        self._answered = True
        found: Reply | Refusal | None = Refusal(answer.status, said(answer.body))
        if answer.status == 200:
            found = read_body(answer.body)
        if found is None or (isinstance(found, Refusal) and found.status is None):
            words = said(answer.body)
            reason = f"is no OpenAI-compatible server: it answers {words}"
            raise _RetryError(f"answers {words}" if self._answered_well else reason, tries=2)
        if isinstance(found, Refusal):
            self._refused(found.status or 0, found.said, answer.retry_after, settings)
        self._answered_well = self._answered_well or bool(found.text)
        return found

    def _post(self, data: bytes) -> _Answer:
        headers = {"Content-Type": "application/json", "User-Agent": f"lorsa/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data, headers, method="POST")
        ends = time.monotonic() + self._timeout_s
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                status, body = response.status, _read(response, ends)
                retry_after = response.headers.get("Retry-After")
        except urllib.error.HTTPError as error:
            status, retry_after = error.code, error.headers.get("Retry-After")
            with error:
                body = _read(error, ends)
        return _Answer(status, self.cut(body.decode("utf-8", "replace")), retry_after)

    def _unreached(self, error: Exception) -> str:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return f"does not answer within {self._timeout_s:g} s; see --timeout"
        words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        words = one_line(self.cut(str(words)), 120)
        return f"cannot be reached ({words}); is it running, is the URL right?"

    def _refused(
        self, status: int, words: str, retry_after: str | None, settings: dict[str, Any]
    ) -> NoReturn:
        """Raise the error that an answer other than success means."""
        reason = f"answers {status} ({words})"
        if status in (408, 429) or status >= 500:
            wait_s = _seconds(retry_after)
            busy = status == 429  # whoever asks
            raise _RetryError(reason, tries=BUSY_TRIES, wait_s=wait_s, of_prompt=not busy)
        if status in (400, 422) and (left := without_refused(settings, words)) is not None:
            raise _SettingsError(left)
        if status in (400, 413, 422):
            raise ReplyError(self.cut(reason))
        of_prompt = self._answered_well and status >= 400 and status not in OF_ALL
        self._fail(f"{reason}; {self._advice(status)}", of_prompt=of_prompt)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return "set another key" if self._key else f"set a key in {KEYS[0]}"
        if status == 404:
            return f"is there a model {self.model!r}, and should the URL end in /v1?"
        if status < 400:
            return "it sends requests elsewhere: give the address that it answers under"
        return "is it an OpenAI-compatible server?"

    def _count(self, reply: Reply, prompt: str) -> None:
        sent, got = reply.tokens_in, reply.tokens_out
        with self._lock:
            self.tokens_in += n_tokens(prompt) if sent is None else sent
            self.tokens_out += n_tokens(reply.text) if got is None else got


def _within(timeout_s: float, work: Callable[[], T]) -> T:
    """Return what work returns, in a time that also holds for names, greetings and heads.

    Raises:
        TimeoutError: it takes longer; it is left to itself, and to its own time limits.
    """
    done: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            failure = error  # the name of a caught error is gone after its block
            done.put(lambda: _raise(failure))
        else:
            done.put(lambda: value)

    threading.Thread(target=run, daemon=True).start()
    try:
        outcome = done.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError from None
    return outcome()


def _raise(error: BaseException) -> NoReturn:
    raise error


def _read(response: Any, ends: float) -> bytes:
    """Return a body, cut to the largest size; TimeoutError if it is not whole in time."""
    body = bytearray()
    while len(body) < LARGEST_BODY and (more := response.read1(LARGEST_BODY - len(body))):
        body += more
        if time.monotonic() > ends:
            raise TimeoutError
    return bytes(body)


def _seconds(header: str | None) -> float:
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
