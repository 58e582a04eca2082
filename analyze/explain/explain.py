"""Explanations: a language model writes a line about each head, and is then tried on it.

One request shows a head's top examples and asks for a line. A second shows that line alone, and
contexts held out from the first, in half of which the head fires, and asks in which: the score is
the balanced accuracy.

Source: detection scoring, Paulo et al. 2024, arXiv:2410.13928. Here a context ends at the token in
question, since a head knows nothing of what follows.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import AnalyzeError
from ...language.spelling import numbers
from ...stop import stop_when_whole
from ..explanations import EXPLANATIONS, Record
from ..result import Analysis
from .asking import answers, in_threads
from .chat import KEPT, Chat, n_tokens
from .config import ExplainConfig
from .endpoint import EndpointError, endpoint_name, find_key, is_loopback
from .prompts import Prompts

MOST_FAILURES = 10
"""Heads in a row that fail before it is given up."""
N_ESTIMATED = 100
"""Heads whose prompts are counted for an estimate; more are assumed to be like them."""
N_TOLD = 10
"""Heads that a result names."""
DEFAULT_TOP = 100
TYPICAL_TEXT = "x" * 150
TOKENS_OUT = (50, 30)
"""Of an explanation and of a list of passages, about."""


class Said(NamedTuple):
    """A head is done."""

    head: int
    """Its number"""
    words: str
    """Its explanation, or why there is none"""
    score: float | None
    """Balanced accuracy, if it was scored"""
    n_done: int
    """Heads done"""
    n_heads: int
    """Heads to do"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What would be sent."""

    endpoint: str
    """Without its query."""
    model: str
    """The model's name there."""
    key: str | None
    """The variable that the key is from; None sends none."""
    n_heads: int
    """Heads chosen."""
    n_before: int
    """Of these, explained and scored already."""
    requests: int
    """Two a head, where enough is held out."""
    tokens_in: int
    """Sent, a token for every 4 characters."""
    tokens_out: int
    """Received; what a model thinks aloud is not in it."""
    cost_usd: float | None
    """By the prices given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """What a call came to."""

    endpoint: str
    """Without its query."""
    model: str
    """The model's name there."""
    n_heads: int
    """Heads chosen."""
    n_explained: int
    """Of these, those that have an explanation now."""
    n_before: int
    """Of these, explained and scored by earlier calls."""
    n_failed: int
    """Heads that got no explanation, or no score, in this call."""
    n_scored: int
    """Heads chosen that have a score."""
    mean_score: float | None
    """Their mean balanced accuracy."""
    requests: int
    """Sent by this call, those sent again included."""
    tokens_in: int
    """As the server counts; a token for every 4 characters where it does not."""
    tokens_out: int
    """The same of the replies."""
    cost_usd: float | None
    """By the prices given."""
    file: str
    """Where the explanations are."""
    first: list[dict[str, Any]]
    """The first ten heads chosen that have one: head, text, score, n_scored."""
    failed: list[dict[str, Any]]
    """Up to ten that failed: head, error."""


class _Work:
    """An analysis, the heads chosen, what was said of them."""

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
        self.said = analysis.explanations()
        self.todo = [head for head in self.heads if not self.is_done(head)]

    def is_done(self, head: int) -> bool:
        return head in self.said and self.said[head]["n_scored"] is not None


Report = Callable[[str | Estimate | Said], None]


def estimate(config: ExplainConfig) -> Estimate:
    """Say what explanations would cost; nothing is sent.

    Raises:
        AnalyzeError: there is no analysis that can be explained, or no such head.
    """
    return _estimate(_Work(config))


def explain(
    config: ExplainConfig, *, report: Report = lambda said: None, backoff_s: float = 1.0
) -> Explained:
    """Let a language model explain heads; what it says is appended to explanations.jsonl.

    The same call goes on where an earlier one was stopped. Heads that failed are asked for again.

    Args:
        config: the request.
        report: is told the estimate, warnings, and every head that is done.
        backoff_s: seconds before a busy server is asked again; doubled each time.

    Raises:
        AnalyzeError: nothing can be explained, or the endpoint does not work.
        KeyboardInterrupt: the process was asked to stop; what was answered is kept.
    """
    work = _Work(config)
    report(_estimate(work))
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

    def tell() -> None:
        stopped.set()
        report("stopping: the answers under way are waited for")

    with Record(work.path) as record, stop_when_whole(on_first=tell) as stop:
        failed = _ask_all(work, chat, record, stopped=stopped, report=report)
    if stop.asked:
        raise KeyboardInterrupt
    return _explained(work, chat, failed)


def _ask_all(
    work: _Work, chat: Chat, record: Record, *, stopped: threading.Event, report: Report
) -> dict[int, str]:
    """Ask about all heads, several at once, and write down every answer; return what failed."""
    failed: dict[int, str] = {}
    texts = {head: said["text"] for head, said in work.said.items()}
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
        in_a_row = 0 if "n_scored" in line else in_a_row + 1
        words = texts.get(head, "")
        if "error" in line:
            words = failed[head] = line["error"]
        report(Said(head, words, line.get("score"), n_done, len(work.todo)))
        if in_a_row == MOST_FAILURES:
            raise EndpointError(
                f"{chat.name}: {in_a_row} heads in a row failed, the last: {words}; {KEPT}"
            )
    return failed


def _chosen(analysis: Analysis, config: ExplainConfig) -> list[int]:
    """Return the heads to explain; of those named, the ones that fire."""
    heads = analysis.heads
    fires = [bool(n) for n in heads["n_fired"].to_pylist()]
    if config.heads is not None:
        asked = list(dict.fromkeys(numbers("heads", config.heads)))
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


def _estimate(work: _Work) -> Estimate:
    some = work.todo[:: max(1, len(work.todo) // N_ESTIMATED)]
    requests = tokens_in = tokens_out = 0
    for head in some:
        trial = work.prompts.trial(head)
        prompts = [] if head in work.said else [work.prompts.explain(head)]
        tokens_out += TOKENS_OUT[0] * len(prompts)
        if trial is not None:
            prompts.append(trial.prompt(TYPICAL_TEXT))
            tokens_out += TOKENS_OUT[1]
        requests += len(prompts)
        tokens_in += sum(n_tokens(prompt) for prompt in prompts)
    scale = len(work.todo) / max(1, len(some))
    _, key = find_key()
    return Estimate(
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
    said = work.analysis.explanations()
    have = [head for head in work.heads if head in said]
    scores = [said[head]["score"] for head in have if said[head]["score"] is not None]
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
        first=[{"head": head, **said[head]} for head in have[:N_TOLD]],
        failed=[{"head": head, "error": error} for head, error in list(failed.items())[:N_TOLD]],
    )
