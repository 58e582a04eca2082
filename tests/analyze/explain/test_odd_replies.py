"""Odd replies, which are one head's trouble, against a server on loopback."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_stub import Answer, Stub, obliging
from lorsa.analyze.explain.config import ExplainConfig
from lorsa.analyze.explain.explain import explain
from lorsa.analyze.explain.prompts import Prompts
from lorsa.analyze.explain.replies import Refusal, Reply, read_body
from lorsa.analyze.explain.settings import REFUSED_BY, Settings, without_refused
from lorsa.analyze.explanations import Record, read_failed
from lorsa.analyze.result import Analysis
from lorsa.errors import AnalyzeError

from reading import make_analysis

ODD = 5
"""Head whose passages get an odd reply."""


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an analysis."""
    make_analysis(tmp_path / "run" / "analysis")
    return tmp_path / "run"


@pytest.fixture
def go(run: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    for name in ("LORSA_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def go(**changes: Any) -> Any:
        asked = {"endpoint": stub.url, "model": "m", "heads": "2,5,7", "concurrency": 1, **changes}
        return explain(ExplainConfig(run=run, **asked), backoff_s=0.01)

    return go


def _to_one(run: Path, answer: Answer) -> Callable[[str], Answer]:
    """Return a server that gives an answer to the passages of head ODD, and else is obliging."""
    passages = Prompts(Analysis.open(run), seed=0).explain(ODD)
    return lambda prompt: answer if prompt.startswith(passages) else obliging(prompt)


def _body(**content: Any) -> Answer:
    return Answer(json.dumps(content))


FILTERED = {"index": 0, "finish_reason": "content_filter", "message": {"role": "assistant"}}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_body(choices=[FILTERED]), "it is empty), and ended by content_filter"),
        (_body(choices=[{"message": {"content": None, "refusal": "I will not"}}]), "I will not"),
        (_body(choices=[]), "it is empty"),
        (_body(choices=[{"message": None}]), "it is empty"),
        (_body(choices=[{"message": {"content": [{"text": None}, 3]}}]), "it is empty"),
        (_body(error={"message": "flagged", "code": 400}), "answers 400 (flagged)"),
        (_body(choices=[{"error": {"message": "no", "code": "502"}}]), "answers 502 (no), 6 times"),
        (_body(error="an odd word"), "answers an odd word, 2 times"),
        (_body(error={"message": "no", "type": "overloaded_error"}), "answers 503 (no), 6 times"),
        (Answer("[" * 100_000), "answers [[[["),
        (Answer("<html>moment</html>"), "answers HTML, 2 times"),
        (Answer("{}", 500), "answers 500 ({}), 6 times"),
        (Answer('{"error": {"message": "flagged"}}', 403), "answers 403 (flagged)"),
        (Answer("", 404), "answers 404 (nothing)"),
    ],
)
def test_an_odd_reply_is_one_heads_trouble(
    run: Path, stub: Stub, go: Callable[..., Any], answer: Answer, reason: str
) -> None:
    """A reply without content, and an error in a 200, were taken for no server at all.

    The command ended, and ended there again whenever it was asked.
    """
    stub.answer = _to_one(run, answer)
    result = go()
    assert (result.n_explained, result.n_failed) == (2, 1)
    assert result.failed[0]["head"] == ODD
    assert reason in result.failed[0]["error"]
    stub.answer = obliging
    again = go()
    assert (again.n_explained, again.n_failed) == (3, 0)


def test_a_connection_that_ends_is_one_heads_trouble(
    run: Path, stub: Stub, go: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that broke off at one prompt was taken for one that is not there."""
    passages = Prompts(Analysis.open(run), seed=0).explain(ODD)

    def answer(prompt: str) -> Answer:
        if prompt.startswith(passages):
            raise ConnectionResetError
        return obliging(prompt)

    monkeypatch.setattr(stub, "handle_error", lambda *_: None)
    stub.answer = answer
    result = go()
    assert (result.n_explained, result.n_failed) == (2, 1)
    assert "Remote end closed connection" in result.failed[0]["error"]


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Rate limit exceeded", "code": 429},
        {"message": "slow down", "type": "rate_limit_error"},
        {"message": "no quota", "status": "RESOURCE_EXHAUSTED"},
        {"message": "busy", "code": "503"},
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_busy_server_that_answers_200_is_asked_again(
    stub: Stub, go: Callable[..., Any], error: dict[str, Any], wrapped: bool
) -> None:
    """A limit of the rate, told in the body of a 200, ended the command."""
    body: Any = {"error": error}
    answers = [Answer(json.dumps([body] if wrapped else body))] * 3
    stub.answer = lambda prompt: answers.pop() if answers else obliging(prompt)
    result = go()
    assert (result.n_explained, result.n_failed, result.requests) == (3, 0, 9)


@pytest.mark.parametrize("error", [{"code": 401}, {"type": "authentication_error"}, {"code": 402}])
def test_what_all_would_get_ends_the_command(
    stub: Stub, go: Callable[..., Any], error: dict[str, Any]
) -> None:
    stub.answer = lambda p: obliging(p) if len(stub.bodies) < 3 else _body(error=error)
    with pytest.raises(AnalyzeError, match="what was answered is kept"):
        go()
    assert len(stub.bodies) == 3


def test_heads_that_failed_are_asked_last_and_end_nothing(
    run: Path, stub: Stub, go: Callable[..., Any]
) -> None:
    """Ten heads that fail each time were asked first, and kept all others from being asked."""
    record = run / "analysis" / "explanations.jsonl"
    with Record(record) as file:
        for head in range(11):
            file.add({"head": head, "error": "no"})
    assert read_failed(record) == set(range(11))
    prompts = Prompts(Analysis.open(run), seed=0)
    failing = {prompts.explain(head) for head in range(11)}
    stub.answer = lambda p: Answer("no", 400) if p in failing else obliging(p)
    result = go(heads="0-14")
    assert (result.n_explained, result.n_failed) == (4, 11)
    assert set(stub.prompts[-11:]) == failing


def test_a_head_at_which_all_ends_is_asked_last(
    run: Path, stub: Stub, go: Callable[..., Any]
) -> None:
    """A prompt that a server cannot do, the first of all, was the first again each time."""
    stub.answer = _to_one(run, Answer("", 500))
    with pytest.raises(AnalyzeError, match="answers 500"):
        go(heads=f"{ODD},2,7")
    result = go(heads=f"{ODD},2,7")
    assert (result.n_explained, result.n_failed) == (2, 1)


def test_a_limit_that_one_prompt_needs_stays_with_the_others(
    run: Path, stub: Stub, go: Callable[..., Any]
) -> None:
    """One long prompt, refused for max_tokens, took max_tokens off all that followed."""
    passages = Prompts(Analysis.open(run), seed=0).explain(ODD)

    def answer(prompt: str) -> Answer:
        if prompt == passages and "max_tokens" in stub.bodies[-1]:
            return Answer('{"error": "the context is 512; you ask for max_tokens 1000"}', 400)
        return obliging(prompt)

    stub.answer = answer
    result = go(heads="5,2,7")
    assert (result.n_explained, result.n_failed) == (3, 0)
    without = [p for p, b in zip(stub.prompts, stub.bodies, strict=True) if "max_tokens" not in b]
    assert without == [passages]


def test_settings_that_no_prompt_is_answered_with_are_left_out_of_all() -> None:
    """One under another name goes under that."""
    settings = Settings(100)
    for _ in range(REFUSED_BY):
        sent = settings.of_prompt()
        assert set(sent) == {"max_tokens", "temperature"}
        left = without_refused(sent, "'max_tokens' is not there: use 'max_completion_tokens'")
        assert left == {"temperature": 0, "max_completion_tokens": 100}
        settings.learn(left)
    assert settings.of_prompt() == {"temperature": 0, "max_completion_tokens": 100}
    for _ in range(REFUSED_BY):
        settings.learn({"max_completion_tokens": 100})
    assert set(settings.of_prompt()) == {"temperature", "max_completion_tokens"}  # it was taken
    assert without_refused({"temperature": 0}, "too long") is None


def test_being_busy_and_being_refused_are_counted_apart(stub: Stub, go: Callable[..., Any]) -> None:
    """A prompt that was refused for a setting after several 503 ended the command."""

    def answer(prompt: str) -> Answer:
        if len(stub.bodies) <= 4:
            return Answer("", 503)
        return Answer("temperature", 400) if "temperature" in stub.bodies[-1] else obliging(prompt)

    stub.answer = answer
    assert go(heads="2").n_explained == 1


@pytest.mark.parametrize("head", ["HTTP/1.1 200 OK\r\nServer: ", "HTTP/1.1 200 OK\r\n\r\n", ""])
def test_a_reply_that_never_ends_is_given_up(go: Callable[..., Any], head: str) -> None:
    """--timeout was for each byte: one now and then held the command for ever."""
    ended = threading.Event()

    def serve(listening: socket.socket) -> None:
        client, _ = listening.accept()
        with client:
            client.recv(2**20)
            client.sendall(head.encode())
            while not ended.wait(0.05):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=serve, args=(listening,))
        server.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        try:
            with pytest.raises(AnalyzeError, match="does not answer within 0.5 s; see --timeout"):
                go(endpoint=url, timeout=0.5)
        finally:
            ended.set()
            server.join()


def test_one_slow_prompt_is_one_heads_trouble(
    run: Path, stub: Stub, go: Callable[..., Any]
) -> None:
    """One prompt that takes too long ended the command."""
    stub.answer = _to_one(run, obliging("")._replace(after_s=1.5))
    result = go(timeout=0.5)
    assert (result.n_explained, result.n_failed) == (2, 1)
    assert "does not answer within 0.5 s; see --timeout, 3 times" in result.failed[0]["error"]


@pytest.mark.parametrize("n", [-1, True, 10**400, "7", 1.5, None])
def test_counts_that_cannot_be_are_not_believed(
    stub: Stub, go: Callable[..., Any], n: object
) -> None:
    """A count of 400 digits made the cost an OverflowError."""
    said = json.dumps({"explanation": "a noun", "fires": []})
    usage = {"prompt_tokens": n, "completion_tokens": n}
    stub.answer = lambda _: _body(choices=[{"message": {"content": said}}], usage=usage)
    result = go(price_in=1.0, price_out=1.0)
    assert result.tokens_out == 6 * -(-len(said) // 4)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ('{"choices": [{"message": {"content": "a"}}]}', Reply("a")),
        ('{"choices": [{"message": {"content": [{"text": "a"}, {"text": "b"}]}}]}', Reply("ab")),
        ('{"choices": [{"message": {"content": "a"}}], "error": null}', Reply("a")),
        ('{"object": "error", "message": "no", "code": 400}', Refusal(400, "no")),
        ('{"error": {"message": "no", "code": 7}}', Refusal(None, "no")),
        ('{"error": "Unexpected endpoint"}', Refusal(None, "Unexpected endpoint")),
        ('{"choices": [3]}', None),
        ('{"choices": null}', None),
        ("[]", None),
        ("3", None),
    ],
)
def test_bodies_are_told_apart(body: str, found: Reply | Refusal | None) -> None:
    assert read_body(body) == found
