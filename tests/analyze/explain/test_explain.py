"""Explanations, against a server on loopback that answers well, badly, late or not at all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_stub import Answer, Stub, obliging, says
from lorsa import cli
from lorsa.analyze.explain.config import ExplainConfig
from lorsa.analyze.explain.explain import HeadDone, estimate, explain
from lorsa.analyze.explain.prompts import REMINDER, Prompts
from lorsa.analyze.explanations import Record, read_explanations
from lorsa.analyze.result import Analysis
from lorsa.errors import AnalyzeError
from typer.testing import CliRunner

from reading import make_analysis

KEY = "sk-secret-0123456789"
Settings = dict[str, Any]


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORSA_API_KEY", "OPENAI_API_KEY", "LORSA_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an analysis."""
    make_analysis(tmp_path / "run" / "analysis")
    return tmp_path / "run"


@pytest.fixture
def settings(run: Path, stub: Stub) -> Settings:
    return {"run": run, "endpoint": stub.url, "model": "m", "heads": "2,5,7"}


def _go(settings: Settings, **changes: Any) -> tuple[Any, list[Any]]:
    told: list[Any] = []
    result = explain(ExplainConfig(**{**settings, **changes}), report=told.append, backoff_s=0.01)
    return result, told


def _record(run: Path) -> Path:
    return run / "analysis" / "explanations.jsonl"


def _fails(settings: Settings, **changes: Any) -> str:
    with pytest.raises(AnalyzeError) as error:
        _go(settings, **changes)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_heads_are_explained_and_scored(run: Path, settings: Settings, stub: Stub) -> None:
    """One that judges rightly gets 1, one that judges head 5 wrongly 0."""
    analysis = Analysis.open(run)
    right = {}
    for head in (2, 5, 7):
        trial = Prompts(analysis, seed=0).trial(head)
        assert trial is not None
        assert sum(trial.fires) * 2 == len(trial.fires) == 8
        right[head] = (trial, [i for i, fires in enumerate(trial.fires, 1) if fires == (head != 5)])

    def judge(prompt: str) -> Answer:
        for trial, numbers in right.values():
            if trial.passages[0] in prompt and trial.passages[1] in prompt:
                return says({"fires": numbers})
        return says({"explanation": "fires"})

    stub.answer = judge
    result, told = _go(settings, price_in=1.0, price_out=10.0)
    assert (result.n_heads, result.n_explained, result.n_failed) == (3, 3, 0)
    assert (result.n_scored, result.mean_score) == (3, pytest.approx(2 / 3))
    assert (result.requests, result.tokens_in, result.tokens_out) == (6, 600, 60)
    assert result.cost_usd == pytest.approx(1.2e-3)
    found = analysis.explanations()
    assert {head: said["score"] for head, said in found.items()} == {2: 1.0, 5: 0.0, 7: 1.0}
    assert found[2] | {"score": 0} == {
        "text": "fires",
        "model": "m",
        "score": 0,
        "n_scored": 8,
        "scorer": "m",
    }
    done = [event for event in told if isinstance(event, HeadDone)]
    assert [event.n_done for event in done] == [1, 2, 3]
    again, _ = _go(settings)
    assert (again.requests, again.n_before, again.mean_score) == (0, 3, result.mean_score)


def test_only_the_prompts_are_sent_and_the_key_is_in_its_header_alone(
    run: Path,
    settings: Settings,
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORSA_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    stub.answer = lambda prompt: (
        says({"explanation": f"I know {KEY}"}) if "explanation" in prompt else Answer(KEY, 500)
    )
    broken, _ = _go(settings)
    assert (broken.n_explained, broken.n_failed) == (3, 3)
    stub.answer = obliging
    result, told = _go(settings)
    prompts = Prompts(Analysis.open(run), seed=0)
    expected = {prompts.explain(head) for head in (2, 5, 7)}
    for head, said in Analysis.open(run).explanations().items():
        assert KEY not in said["text"]
        trial = prompts.trial(head)
        assert trial is not None
        expected.add(trial.prompt(said["text"]))
    assert set(stub.prompts) <= expected
    assert not any("text-0.txt" in prompt for prompt in stub.prompts)
    for body in stub.bodies:
        assert body.keys() == {"model", "messages", "max_tokens", "temperature"}
        assert [set(sent) for sent in body["messages"]] == [{"role", "content"}]
    usual = {"Host", "Accept-Encoding", "Connection", "Content-Length", "Content-Type"}
    for headers in stub.headers:
        assert set(headers) == usual | {"User-Agent", "Authorization"}
        assert headers["Authorization"] == f"Bearer {KEY}"
    assert set(stub.paths) == {"/v1/chat/completions"}
    out, err = capfd.readouterr()
    for text in (str(broken), out, err, str(told), str(result), _record(run).read_text()):
        assert KEY not in text


def test_no_key_no_header(settings: Settings, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty LORSA_API_KEY keeps the other from being sent."""
    monkeypatch.setenv("LORSA_API_KEY", "")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _go(settings)
    assert not any("Authorization" in headers for headers in stub.headers)
    monkeypatch.setenv("LORSA_API_KEY", "sk\nno")
    assert "LORSA_API_KEY holds characters" in _fails(settings, heads="1")


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_busy_server_is_asked_again(settings: Settings, stub: Stub, status: int) -> None:
    answers = [Answer("later", status), Answer("{}", status)]
    stub.answer = lambda prompt: answers.pop() if answers else obliging(prompt)
    result, _ = _go(settings)
    assert (result.n_explained, result.n_failed, result.requests) == (3, 0, 8)


def test_retry_after_is_waited_for_by_all(settings: Settings, stub: Stub) -> None:
    answers = [Answer("slow down", 429, {"Retry-After": "1"})]
    stub.answer = lambda prompt: answers.pop() if answers else obliging(prompt)
    result, _ = _go(settings, concurrency=1)
    assert result.n_explained == 3
    assert stub.times[1] - stub.times[0] >= 1
    stub.answer = lambda prompt: Answer("tomorrow", 429, {"Retry-After": "86400"})
    assert "asks to wait 86,400 s; what was answered is kept" in _fails(settings, heads="9")


def test_requests_are_spaced_and_few_at_once(settings: Settings, stub: Stub) -> None:
    stub.answer = lambda prompt: obliging(prompt)._replace(after_s=0.05)
    _go(settings, heads="0-7", concurrency=2)
    assert stub.most_open == 2
    stub.times.clear()
    _go(settings, heads="8-10", requests_per_minute=1200)
    assert stub.times[-1] - stub.times[0] >= 0.2  # five times 50 ms, and what a thread is late


@pytest.mark.parametrize("nonsense", ["", "I cannot say.", '{"explanation": 3}', "{" * 5000, "🙂"])
def test_nonsense_is_asked_again_once_then_the_head_failed(
    run: Path, settings: Settings, stub: Stub, nonsense: str
) -> None:
    bad = Prompts(Analysis.open(run), seed=0).explain(5)
    stub.answer = lambda prompt: says(nonsense) if prompt.startswith(bad) else obliging(prompt)
    result, _ = _go(settings)
    assert (result.n_explained, result.n_failed, result.requests) == (2, 1, 6)
    assert result.failed[0]["head"] == 5
    assert 'no JSON object with an "explanation"' in result.failed[0]["error"]
    assert sum(prompt == bad + REMINDER for prompt in stub.prompts) == 1
    assert 5 not in Analysis.open(run).explanations()
    stub.answer = obliging
    again, _ = _go(settings)
    assert (again.n_explained, again.n_failed, again.requests) == (3, 0, 2)


def test_a_score_that_failed_is_all_that_is_asked_for_again(
    run: Path, settings: Settings, stub: Stub
) -> None:
    stub.answer = lambda p: says("none", finish_reason="length") if 'fires"' in p else obliging(p)
    result, _ = _go(settings)
    assert (result.n_explained, result.n_scored, result.n_failed) == (3, 0, 3)
    assert "was cut; give more --max-tokens" in result.failed[0]["error"]
    stub.answer = obliging
    again, _ = _go(settings)
    assert (again.n_scored, again.mean_score, again.requests) == (3, 0.5, 3)


def test_many_failures_in_a_row_end_it(settings: Settings, stub: Stub) -> None:
    stub.answer = lambda prompt: Answer('{"error": {"message": "too long"}}', 400)
    message = _fails(settings, heads="0-22")
    assert "10 heads in a row failed, the last: answers 400 (too long)" in message


def test_parameters_that_a_model_does_not_know_are_left_out(settings: Settings, stub: Stub) -> None:
    def picky(prompt: str) -> Answer:
        for name in ("max_tokens", "temperature"):
            if name in stub.bodies[-1]:
                return Answer(json.dumps({"error": {"message": f"Unsupported: '{name}'"}}), 400)
        return obliging(prompt)

    stub.answer = picky
    result, _ = _go(settings, concurrency=1)
    assert (result.n_explained, result.requests) == (3, 6 + 3 * 2)


LATER = Answer("{}", 500)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer('{"error": "bad key"}', 401), "answers 401 (bad key); set a key in LORSA_API_KEY"),
        (Answer("<html>no</html>", 404), "404 (HTML); is there a model 'm', and should the URL"),
        (Answer("", 405), "answers 405 (nothing); is it an OpenAI-compatible server?"),
        (Answer("", 302, {"Location": "/v2"}), "answers 302 (nothing); it sends requests else"),
        (Answer("<html>hello</html>"), "is no OpenAI-compatible server: it answers HTML, 2 times"),
        (Answer('{"result": 4}'), "it answers {'result': 4}, 2 times; what was answered is kept"),
        (Answer("[]\n\x1b[31m"), "it answers [] [31m, 2 times"),
        (Answer('{"error": {"message": "no\\nluck"}}', 503), "answers 503 (no luck), 6 times"),
        (Answer("{", 200, {"Content-Length": "9"}), "it answers {, 2 times"),
    ],
)
def test_an_endpoint_that_does_not_work_is_one_line(
    run: Path, settings: Settings, stub: Stub, answer: Answer, message: str
) -> None:
    """What it said before is kept."""
    _go(settings, heads="1")
    before = read_explanations(_record(run))
    stub.answer = lambda prompt: answer
    assert message in _fails(settings)
    assert read_explanations(_record(run)) == before
    assert len(stub.paths) <= 2 + 4 * 6


def test_a_server_that_is_slow_or_away_is_one_line(settings: Settings, stub: Stub) -> None:
    stub.answer = lambda prompt: obliging(prompt)._replace(after_s=2)
    assert "does not answer within 0.2 s; see --timeout" in _fails(settings, timeout=0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1?key=secret"
        message = _fails(settings, endpoint=url)
    assert "cannot be reached (Connection refused); is it running" in message
    assert "secret" not in message


COMMAND = "from lorsa.cli import main; main()"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_answered_before_a_kill_is_not_asked_again(
    run: Path, settings: Settings, stub: Stub, how: signal.Signals
) -> None:
    """The last line is torn besides."""
    stub.answer = lambda p: obliging(p)._replace(after_s=0 if len(stub.bodies) <= 7 else 1.5)
    args = ["explain", run, "--endpoint", stub.url, "--model", "m", "--top", 9, "--yes"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, args), "--concurrency", "2"],
        stderr=subprocess.PIPE,
        text=True,
    )
    ends = time.monotonic() + 120
    while len(stub.bodies) < 8 and time.monotonic() < ends:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    if how == signal.SIGINT:
        assert err.splitlines()[-1] == "stopped; the same command goes on from what is written"
    kept = read_explanations(_record(run))
    asked = len(kept) + sum(said["n_scored"] is not None for said in kept.values())
    assert asked >= 6
    with _record(run).open("a") as file:
        file.write('{"head": 3, "text": "to')
    stub.bodies.clear()
    stub.answer = obliging
    result, _ = _go(settings, heads=None, top=9)
    assert (result.n_explained, result.n_scored, len(stub.bodies)) == (9, 9, 18 - asked)
    now = read_explanations(_record(run))
    assert all(now[head]["text"] == said["text"] for head, said in kept.items())


def test_the_record_is_read_whatever_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "explanations.jsonl"
    assert read_explanations(path) == {}
    with Record(path) as record:
        record.add({"head": 1, "text": "old", "model": "a"})
        record.add({"head": 1, "score": 0.9, "n_scored": 8, "scorer": "a"})
        record.add({"head": 2, "score": 0.9, "n_scored": 8, "scorer": "a"})
        record.add({"head": 1, "text": "new\u2028", "model": "b"})
        with pytest.raises(AnalyzeError, match="is being written by another process; wait"):
            Record(path)
    with path.open("ab") as file:
        file.write(b'\xff\n[]\n{"head": "x", "text": "y"}\n{"head": 1, "te')
    Record(path).add({"head": 3, "error": "no"})
    nothing = {"score": None, "n_scored": None, "scorer": None}
    assert read_explanations(path) == {1: {"text": "new\u2028", "model": "b", **nothing}}
    path.unlink()
    path.mkdir()
    with pytest.raises(AnalyzeError, match="cannot be read"):
        read_explanations(path)


def test_a_disk_that_is_full_ends_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "cannot be written (No space left on device); make room" in _fails(settings)


def test_an_estimate_is_near_what_is_sent(settings: Settings, stub: Stub) -> None:
    before = estimate(ExplainConfig(**settings, price_in=2, price_out=3))
    assert stub.bodies == []
    assert (before.requests, before.n_heads, before.n_before) == (6, 3, 0)
    assert before.cost_usd == pytest.approx((2 * before.tokens_in + 3 * before.tokens_out) / 1e6)
    stub.answer = lambda prompt: says(
        {"fires": []} if '"fires"' in prompt else {"explanation": "x" * 150}, usage=False
    )
    after, _ = _go(settings)
    sent = sum(len(prompt) for prompt in stub.prompts) / 4
    assert after.tokens_in == pytest.approx(sent, rel=0.01)
    assert before.tokens_in == after.tokens_in
    assert estimate(ExplainConfig(**settings)).requests == 0


def test_the_heads_that_fire_are_chosen_by_a_column(run: Path, settings: Settings) -> None:
    heads = Analysis.open(run).heads
    result, _ = _go(settings, heads=None, top=3, sort="n_fired")
    assert sorted(row["head"] for row in result.first) == [20, 21, 22]
    assert estimate(ExplainConfig(**{**settings, "heads": None})).n_heads == heads.num_rows - 1
    assert estimate(ExplainConfig(**{**settings, "heads": "22,23"})).n_heads == 1
    assert "no head of these fired" in _fails(settings, heads="23")
    assert "head 99 is not there; heads are 0..23" in _fails(settings, heads="0,99")


def test_an_analysis_without_text_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Analysis, "_texts", {1: None})
    assert "token ids without text" in _fails(settings)


def test_text_in_clear_is_said(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys.modules[explain.__module__], "_ask_all", lambda *_, **__: {})
    for url in ("http://example.org/v1", "https://example.org/v1", "http://[::1]:8080/v1"):
        told += _go(settings, endpoint=url)[1]
    assert [event for event in told if isinstance(event, str)] == [
        "the endpoint is no https: text, and the key if there is one, are sent in clear"
    ]


def _lorsa(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_the_command_sends_nothing_unless_asked(run: Path, stub: Stub) -> None:
    args = ["explain", run, "--endpoint", stub.url, "--model", "m", "--top", 4]
    shown = _lorsa(*args, "--price-in", 1, "--price-out", 4)
    assert shown.exit_code == 0
    assert "nothing; the same command with --yes sends" in shown.stdout
    assert "USD" in shown.stdout
    plan = json.loads(_lorsa(*args, "--yes", "--dry-run", "--json").stdout)
    assert (plan["sent"], plan["n_heads"], plan["requests"]) == (False, 4, 8)
    assert stub.bodies == []
    assert not _record(run).exists()
    done = _lorsa(*args, "--yes")
    assert done.exit_code == 0
    assert "reads <b>" in done.stdout
    assert "4 of 4 explained, 0 failed" in done.stdout
    assert "0.50 of 4; 0.5 is a guess" in done.stdout
    assert "explain 4 of 4" in done.stderr
    result = json.loads(_lorsa(*args, "--yes", "--json").stdout)
    assert (result["n_explained"], result["n_failed"], result["requests"]) == (4, 0, 0)
    stub.answer = lambda prompt: says("no")
    head = next(n for n in range(9) if n not in [row["head"] for row in result["first"]])
    failed = _lorsa(*args[:-2], "--heads", head, "--yes")
    assert failed.exit_code == 1
    assert "failed: the reply has no JSON object" in failed.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--endpoint", "ftp://x/v1"], 2, "endpoint is 'ftp://x/v1'; allowed: a URL such as"),
        (["--endpoint", "localhost:8080"], 2, "endpoint is 'localhost:8080'"),
        (["--endpoint", "http://a:99999/"], 2, "endpoint cannot be read (Port out of range"),
        (["--endpoint", "https://me:pw@h/v1"], 2, "has a user or password in it; set LORSA_API"),
        (["--endpoint", "http://x/a\nb"], 2, "allowed: a URL such as"),
        (["--model", " "], 2, "model is empty"),
        (["--heads", "1,x"], 2, "heads is '1,x'; allowed: numbers such as 17,301 or 0-7"),
        (["--heads", "9-2"], 2, "heads is '9-2'; allowed: numbers such as 17,301 or 0-7"),
        (["--heads", "0-9999999999"], 2, "heads is '0-9999999999', 10,000,000,000 "),
        (["--heads", "1", "--top", 3], 2, "heads and top exclude each other"),
        (["--sort", "type"], 2, "sort is 'type'; allowed: head, qk_head, n_fired, frequency"),
        (["--top", 0], 2, "top is 0; allowed: 1 or more"),
        (["--timeout", "nan"], 2, "timeout is nan; allowed: above 0"),
        (["--price-in", 3], 2, "a cost needs both"),
        (["--price-in", -1, "--price-out", 1], 2, "prices are (-1.0, 1.0); allowed: 0 or more"),
        (["--heads", 99], 1, "head 99 is not there; heads are 0..23"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--yes"], 1, "cannot be reached"),
    ],
)
def test_the_command_refuses_in_one_line(
    run: Path, stub: Stub, args: list[object], code: int, message: str
) -> None:
    whole = ["explain", run, "--endpoint", stub.url, "--model", "m", *args]
    result = _lorsa(*whole)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    assert message in lines[0]
    assert stub.bodies == []


def test_a_run_without_an_analysis_is_one_line(tmp_path: Path, stub: Stub) -> None:
    result = _lorsa("explain", tmp_path, "--endpoint", stub.url, "--model", "m", "--yes")
    assert result.exit_code == 1
    assert "is not there: lorsa analyze" in result.stderr
