"""Many runs on a terminal and in a log file."""

import io
from typing import Any

import pytest
from lorsa.dictionaries.metrics import Quality
from lorsa.display import bars, sweep
from lorsa.display.show import show
from lorsa.display.sweep import SweepDisplay, best_rows
from lorsa.train.report.events import Ended, EvalReport, RunEvent, StepReport, TrainResult
from rich.console import Console

TOTAL = 100_000
QUALITY = Quality(
    fvu=0.25, l0=60.0, dead_fraction=0.1, n_tokens=1, fvu_all=0.3, masked_fraction=0.0
)


def _step(tokens: int) -> StepReport:
    return StepReport(
        step=tokens // 1000,
        tokens=tokens,
        train_tokens=TOTAL,
        loss=0.125,
        grad_norm=1.0,
        lr=1e-3,
        top_k=64,
        dead_fraction=0.05,
        tokens_per_second=1000.0,
        data_wait_fraction=0.02,
    )


def _result(fvu: float) -> TrainResult:
    return TrainResult(
        run="runs/x",
        layer=1,
        n_features=8,
        fvu=fvu,
        l0=60.0,
        dead_fraction=0.02,
        dead_window_tokens=1,
        n_ov_heads=8,
        n_qk_heads=4,
        top_k=64,
        train_tokens=TOTAL,
        held_out_tokens=1,
        tokens_per_second=1000.0,
        data_wait_fraction=0.0,
        seconds=1.0,
    )


@pytest.fixture
def consoles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make stderr a terminal or a file of a size; return what is written there."""

    def make(*, terminal: bool, width: int = 100, height: int = 30) -> io.StringIO:
        file = io.StringIO()
        console = Console(
            file=file, force_terminal=terminal, width=width, height=height, highlight=False
        )
        for module in (bars, sweep):
            monkeypatch.setattr(module, "err", console)
        return file

    return make


def _feed(shown: SweepDisplay, names: list[str]) -> None:
    """Let the first runs end, in each way, the next run, and the others wait."""
    shown(RunEvent(names[0], Ended(_result(0.1), before=True)))
    shown(RunEvent(names[1], Ended(None, "n_ov_heads is 7; n_qk_heads 4 does not divide it")))
    for name in names[2:5]:
        shown(RunEvent(name, EvalReport(0, 0, QUALITY)))
        shown(RunEvent(name, _step(20_000)))
        shown(RunEvent(name, _step(40_000)))
    if len(names) > 2:
        shown(RunEvent(names[2], Ended(_result(0.2))))


def _text(shown: SweepDisplay, rows: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=sweep.err.width).print(shown.table(rows))
    return file.getvalue().rstrip().splitlines()


@pytest.mark.parametrize("n_runs", [2, 6, 40])
@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_table_stays_readable(consoles: Any, n_runs: int, width: int) -> None:
    consoles(terminal=True, width=width)
    names = [f"top_k-{8 + i}_lr-0.001_expansion-8" for i in range(n_runs)]
    shown = SweepDisplay(names)
    _feed(shown, names)
    most = 12
    lines = _text(shown, most)
    assert max(map(len, lines)) <= width
    body = [line for line in lines if "top_k-" in line]
    assert len(body) == min(n_runs, most - (n_runs > most))
    text = "\n".join(lines)
    assert "failed" in text
    if n_runs == 40:
        assert "and 29 more" in text
        assert "28 waiting, 1 finished before" in text or width == 60
        assert text.count("running 40%") == 2
        assert "0.2000" in text
    elif n_runs == 2:
        assert "finished before" in text


def test_the_summary_counts_states_and_tells_what_is_left(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    consoles(terminal=False)
    now = [100.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    shown = SweepDisplay(["a", "b", "c", "d"])
    shown(RunEvent("a", _step(10_000)))
    shown(RunEvent("b", _step(10_000)))
    now[0] += 10
    shown(RunEvent("a", _step(60_000)))
    shown(RunEvent("b", _step(60_000)))
    shown(RunEvent("a", EvalReport(60, 60_000, QUALITY)))
    shown(RunEvent("c", Ended(None, "no room")))
    # 40,000 + 40,000 + 100,000 tokens are left of 400,000, at 100,000 in 10 s
    assert shown.summary() == (
        "sweep 55%: 1 waiting, 2 running, 1 failed  10,000 tok/s  data wait 2%  "
        "best FVU 0.2500 (a)  18 s left"
    )


def test_of_several_places_none_is_called_the_best(consoles: Any) -> None:
    """The FVU of a Lorsa was compared with that of an SAE."""
    consoles(terminal=False)
    shown = SweepDisplay(["layer-1", "1.resid_out"], comparable=False)
    shown(RunEvent("layer-1", EvalReport(60, 60_000, QUALITY)))
    assert "best" not in shown.summary()
    rows = [
        {"kind": kind, "layer": layer, "fvu": fvu}
        for kind, layer, fvu in (
            ("lorsa", 1, 0.3), ("lorsa", 1, 0.2), ("sae", 1, 0.01), ("lorsa", 2, None),
            ("lorsa", 2, 0.4),
        )
    ]  # fmt: skip
    assert best_rows(rows) == [rows[1], rows[2], rows[4]]
    assert best_rows([{"top_k": 4, "fvu": 0.2}, {"top_k": 8, "fvu": 0.1}])[0]["top_k"] == 8
    assert best_rows([{"fvu": None}]) == []


def test_a_log_file_gets_lines_now_and_then_and_one_for_every_end(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = consoles(terminal=False)
    now = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    with SweepDisplay(["a", "b"]) as shown:
        shown("layer 3, 2 runs")
        for tokens in range(1000, 50_000, 1000):
            now[0] += 1
            shown(RunEvent("a", _step(tokens)))
        shown(RunEvent("a", Ended(_result(0.2))))
        shown(RunEvent("b", Ended(None, "no room")))
    lines = file.getvalue().splitlines()
    assert lines[0] == "· layer 3, 2 runs"
    assert lines[-3] == "· a: finished, FVU 0.2000, dead 2.0%"
    assert lines[-2] == "· b: failed: no room"
    assert lines[-1].startswith("· sweep 100%: 1 finished, 1 failed")
    assert len(lines) == 4 + 49 // 16
    assert "\x1b" not in file.getvalue()


def test_a_terminal_shows_bar_and_table(consoles: Any) -> None:
    file = consoles(terminal=True)
    names = ["a", "b", "c"]
    with SweepDisplay(names) as shown:
        _feed(shown, names)
    text = file.getvalue()
    assert "finished before" in text
    assert "sweep 100%" in text


def test_the_result_of_a_sweep_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"fvu": 0.2, "l0": 31.5, "dead_fraction": 0.01, "tokens_per_second": 1234.0}
    rows = [
        {"top_k": 32, "lr": 1e-3, **row, "run": "runs/a", "error": None},
        {"top_k": 64, "lr": 1e-3, **row, "fvu": None, "run": "runs/b", "error": None},
        {"top_k": 9999, "lr": 1e-3, **dict.fromkeys(row), "run": "runs/c", "error": "[too] many"},
    ]
    show("sweep", {"rows": rows, "out": "runs", "bytes_read": 2_000_000})
    text = capsys.readouterr().out
    assert "0.2000" in text
    assert "failed: [too] many" in text
    assert "sweep.csv and pareto.png in runs; 2 MB read" in text
    show("sweep", {"rows": [], "out": "runs", "bytes_read": 0})
