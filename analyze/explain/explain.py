"""Explanations: a language model writes a line about each head, and is then tried on it.

One request shows a head's top examples and asks for a line. A second shows that line alone and
contexts held out from the first. The head fires in half of them, and the model is asked in which.
The score is the balanced accuracy.

Source: detection scoring, Paulo et al. 2024, arXiv:2410.13928. Here a context ends at the token in
question, since a head knows nothing of what follows.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import AnalyzeError
from ...language.spelling import parse_ids
from ...stop import stop_when_whole
from ..explanations import EXPLANATIONS, Record, read_failed
from ..result import Analysis
from .asking import answers, in_threads
from .chat import KEPT, Chat, n_tokens
from .config import ExplainConfig
from .endpoint import EndpointError, endpoint_name, find_key, is_loopback
from .prompts import Prompts

MOST_FAILURES = 10
"""Heads in a row that may fail before explaining stops; those that failed before do not count."""
N_QUOTED = 100
"""Heads whose prompts are counted for a quote; more are assumed to be like them."""
N_NAMED = 10
"""Heads that a result names."""
DEFAULT_TOP = 100
TYPICAL_TEXT = "x" * 150
"""Stand-in for an explanation that is not written yet."""
TOKENS_OUT = (50, 30)
"""Approximate tokens of an explanation, and of a list of passages."""


class HeadDone(NamedTuple):
    """Event: a head is done."""

    head: int
    words: str
    """Explanation, or why there is none"""
    score: float | None
    """Balanced accuracy, if it was scored"""
    n_done: int
    """Heads done"""
    n_heads: int
    """Heads to do"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quote:
    """Requests and cost that explanations would take."""

    endpoint: str
    """Endpoint without its query."""
    model: str
    """The model's name there."""
    key: str | None
    """Environment variable that holds the key; None sends none."""
    n_heads: int
    """Heads chosen."""
    n_before: int
    """Heads chosen that are explained and scored already."""
    requests: int
    """Requests: two a head, where enough is held out."""
    tokens_in: int
    """Tokens sent, one for every 4 characters."""
    tokens_out: int
    """Tokens received; what a model thinks aloud is not counted."""
    cost_usd: float | None
    """Cost at the prices given; None without prices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """Result of a call."""

    endpoint: str
    """Endpoint without its query."""
    model: str
    """The model's name there."""
    n_heads: int
    """Heads chosen."""
    n_explained: int
    """Heads chosen that have an explanation now."""
    n_before: int
    """Heads chosen that earlier calls explained and scored."""
    n_failed: int
    """Heads that got no explanation, or no score, in this call."""
    n_scored: int
    """Heads chosen that have a score."""
    mean_score: float | None
    """Mean balanced accuracy of heads chosen."""
    requests: int
    """Requests of this call, retries included."""
    tokens_in: int
    """Tokens sent, by the server's count, or one for every 4 characters."""
    tokens_out: int
    """Tokens received, counted in the same way."""
    cost_usd: float | None
    """Cost at the prices given; None without prices."""
    file: str
    """File of the explanations."""
    first: list[dict[str, Any]]
    """The first ten heads chosen that have one: head, text, score, n_scored."""
    failed: list[dict[str, Any]]
    """Up to ten that failed: head, error."""


class _Work:
    """An analysis, the heads chosen and their explanations so far."""

    def __init__(self, config: ExplainConfig) -> None:
        analysis = Analysis.open(config.run)
        if not analysis.has_text:
            raise AnalyzeError(
                f"{analysis.root} has token ids without text, which no model can read: analyze "
                "again with --model"
            )
        self.config = config
        self.analysis = analysis
        self.heads = _chosen(analysis, config)
        self.prompts = Prompts(analysis, seed=config.seed)
        self.path = analysis.root / EXPLANATIONS
        self.explained = analysis.explanations()
        self.failed_before = read_failed(self.path)
        todo = [head for head in self.heads if not self.is_done(head)]
        self.todo = sorted(todo, key=lambda head: head in self.failed_before)

    def is_done(self, head: int) -> bool:
        return head in self.explained and self.explained[head]["n_scored"] is not None


ExplainReport = Callable[[str | Quote | HeadDone], None]
"""Function that takes a line of text, the quote, or a head that is done."""


def estimate(config: ExplainConfig) -> Quote:
    """Return what explanations would take; nothing is sent.

    Raises:
        AnalyzeError: there is no analysis that can be explained, or no such head.
    """
    return _quote(_Work(config))


def explain(
    config: ExplainConfig, *, report: ExplainReport = lambda event: None, backoff_s: float = 1.0
) -> Explained:
    """Let a language model explain heads; answers are appended to explanations.jsonl.

    The same call resumes one that was stopped. Heads that failed are tried again.

    Args:
        config: the request.
        report: called with the quote, warnings, and every head that is done.
        backoff_s: seconds before the first retry of a busy server; doubled each time.

    Raises:
        AnalyzeError: nothing can be explained, or the endpoint does not work.
        KeyboardInterrupt: the process was asked to stop; what was answered is kept.
    """
    work = _Work(config)
    report(_quote(work))
    if config.endpoint.lower().startswith("http:") and not is_loopback(config.endpoint):
        report("the endpoint is no https: text, and the key if there is one, are sent in clear")
    stopped = threading.Event()
    chat = Chat(
        config.endpoint,
        config.model,
        max_tokens=config.max_tokens,
        timeout_s=config.timeout,
        requests_per_minute=config.requests_per_minute,
        stopped=stopped,
        backoff_s=backoff_s,
    )

    def stop_asking() -> None:
        stopped.set()
        report("stopping: the answers under way are waited for")

    with Record(work.path) as record, stop_when_whole(on_first=stop_asking) as stop:
        failed = _ask_all(work, chat, record, stopped=stopped, report=report)
    if stop.asked:
        raise KeyboardInterrupt
    return _explained(work, chat, failed)


def _ask_all(
    work: _Work, chat: Chat, record: Record, *, stopped: threading.Event, report: ExplainReport
) -> dict[int, str]:
    """Ask about all heads, several at once, and write down every answer; return what failed."""
    failed: dict[int, str] = {}
    texts = {head: found["text"] for head, found in work.explained.items()}
    in_a_row = n_done = 0
    for line in in_threads(
        work.todo,
        lambda head: answers(chat, work.prompts, head, texts.get(head)),
        n_threads=work.config.concurrency,
        stopped=stopped,
    ):
        record.add(line)
        head = line["head"]
        if "text" in line:
            texts[head] = line["text"]
            continue
        n_done += 1
        if "n_scored" in line:
            in_a_row = 0
        elif head not in work.failed_before:
            in_a_row += 1
        words = texts.get(head, "")
        if "error" in line:
            words = failed[head] = line["error"]
        report(HeadDone(head, words, line.get("score"), n_done, len(work.todo)))
        if in_a_row == MOST_FAILURES and "error" in line:
            raise EndpointError(
                f"{chat.name}: {in_a_row} heads in a row failed, the last: {words}; {KEPT}"
            )
    return failed


def _chosen(analysis: Analysis, config: ExplainConfig) -> list[int]:
    """Return the heads to explain; of those named, the ones that fire."""
    heads = analysis.heads
    fires = [bool(n) for n in heads["n_fired"].to_pylist()]
    if config.heads is not None:
        asked = list(dict.fromkeys(parse_ids("heads", config.heads)))
        if max(asked) >= len(fires):
            raise AnalyzeError(f"head {max(asked)} is not there; heads are 0..{len(fires) - 1}")
    else:
        values = heads[config.sort].to_pylist()
        known = [head for head, value in enumerate(values) if value is not None and fires[head]]
        asked = sorted(known, key=lambda head: -values[head])
    chosen = [head for head in asked if fires[head]]
    if not chosen:
        raise AnalyzeError(
            f"no head of these fired in {analysis.root}, so there is nothing to explain"
        )
    return chosen if config.heads is not None else chosen[: config.top or DEFAULT_TOP]


def _quote(work: _Work) -> Quote:
    some = work.todo[:: max(1, len(work.todo) // N_QUOTED)]
    requests = tokens_in = tokens_out = 0
    for head in some:
        trial = work.prompts.trial(head)
        prompts = [] if head in work.explained else [work.prompts.explain(head)]
        tokens_out += TOKENS_OUT[0] * len(prompts)
        if trial is not None:
            prompts.append(trial.prompt(TYPICAL_TEXT))
            tokens_out += TOKENS_OUT[1]
        requests += len(prompts)
        tokens_in += sum(n_tokens(prompt) for prompt in prompts)
    scale = len(work.todo) / max(1, len(some))
    _, key = find_key()
    return Quote(
        endpoint=endpoint_name(work.config.endpoint),
        model=work.config.model,
        key=key,
        n_heads=len(work.heads),
        n_before=len(work.heads) - len(work.todo),
        requests=round(scale * requests),
        tokens_in=round(scale * tokens_in),
        tokens_out=round(scale * tokens_out),
        cost_usd=work.config.cost(scale * tokens_in, scale * tokens_out),
    )


def _explained(work: _Work, chat: Chat, failed: dict[int, str]) -> Explained:
    found = work.analysis.explanations()
    have = [head for head in work.heads if head in found]
    scores = [found[head]["score"] for head in have if found[head]["score"] is not None]
    return Explained(
        endpoint=chat.name,
        model=work.config.model,
        n_heads=len(work.heads),
        n_explained=len(have),
        n_before=len(work.heads) - len(work.todo),
        n_failed=len(failed),
        n_scored=len(scores),
        mean_score=sum(scores) / len(scores) if scores else None,
        requests=chat.n_requests,
        tokens_in=chat.tokens_in,
        tokens_out=chat.tokens_out,
        cost_usd=work.config.cost(chat.tokens_in, chat.tokens_out),
        file=str(work.path),
        first=[{"head": head, **found[head]} for head in have[:N_NAMED]],
        failed=[{"head": head, "error": error} for head, error in list(failed.items())[:N_NAMED]],
    )
