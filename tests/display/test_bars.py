"""Progress: parts of the work, times that are true, and a pulse while nothing is known."""

import os
import pty
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.display import bars
from lorsa.display.bars import MeasureBar
from lorsa.display.explain import ExplainDisplay
from lorsa.display.harvest import HarvestDisplay
from lorsa.display.screen import Screen
from lorsa.display.train import TrainDisplay
from lorsa.display.view import PageDisplay
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.harvest.events import Progress
from lorsa.harvest.plan import Estimate
from lorsa.progress import Measured, Stages
from lorsa.train.report.events import StepReport
from lorsa.train.train import train
from runs import config


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal of 60 columns."""
    screen = Screen(stderr=True)
    screen.file = StringIO()
    monkeypatch.setattr(screen, "_force_terminal", True)
    monkeypatch.setattr(screen, "_width", 60)
    monkeypatch.setattr(bars, "err", screen)
    return screen


def _line(bar: bars.Bar) -> str:
    """Return what a bar shows, in one line."""
    screen = bar._progress.console
    with screen.capture() as shown:
        screen.print(bar._progress.get_renderable())
    return " ".join(shown.get().split())


def _done(bar: bars.Bar) -> tuple[float, float | None]:
    (task,) = bar._progress.tasks
    return task.completed, task.total


@pytest.mark.parametrize(
    "bar", [MeasureBar("eval"), HarvestDisplay(), TrainDisplay("layer 3"), PageDisplay("page")]
)
def test_a_bar_pulses_until_something_is_known(bar: bars.Bar) -> None:
    """A model loaded for a minute and a half, and the bar of the part before said 100 %."""
    assert _done(bar) == (0, None)


def test_each_part_has_a_bar_and_its_own_time(screen: Screen) -> None:
    """The second part's time left was 0:00:00 from 4 % on, then 100 % for three minutes."""
    with MeasureBar("analyze") as bar:
        bar(Stages(("loading", "reading heads", "sources of examples", "writing")))
        bar("loading a model on cpu")
        assert "analyze 1/4 loading a model on cpu" in _line(bar)
        assert _done(bar) == (0, None)
        bar(Measured(50, 100, "reading heads", 1.0))
        assert "analyze 2/4 reading heads" in _line(bar)
        assert "50 %" in _line(bar)
        assert "50 s left" in _line(bar)
        bar(Measured(100, 100, "reading heads", 1.0))
        assert _done(bar) == (0, None)  # all is read: what comes takes its time too
        assert "100 %" not in _line(bar)
        bar(Measured(4, 100, "sources of examples", 1.0))
        assert "analyze 3/4 sources of examples" in _line(bar)
        assert "2 min left" in _line(bar).replace("1 min 36 s", "2 min")
        bar("writing")
        assert "analyze 4/4 writing" in _line(bar)
        assert "0:00:00" not in _line(bar)


def test_a_line_that_is_no_part_is_said(screen: Screen) -> None:
    with MeasureBar("analyze") as bar:
        bar(Stages(("reading heads",)))
        bar(Measured(50, 100, "reading heads", 1.0))
        bar("going on after 50 tokens")
        assert _done(bar) == (50, 100)
    assert "going on after 50 tokens" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_harvest_believes_its_estimate_at_first(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bar said -:--:-- for seconds after a line that said how long it takes."""
    with HarvestDisplay() as bar:
        bar(Estimate(batch_seqs=4, tokens_per_second=10.0, seconds=228.0))
        bar(Progress(0, 2280, 0.0))
        assert "3 min 4" in _line(bar)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        bar(Progress(1140, 2280, 19.0))
        assert "3 min" not in _line(bar)


def test_notes_are_cut_where_there_is_no_room(screen: Screen) -> None:
    """A bar of 90 columns took two lines of a narrow terminal, and left them behind."""
    with TrainDisplay("layer 12") as bar:
        bar(
            StepReport(
                step=1,
                tokens=1000,
                train_tokens=99_000_000,
                tokens_per_second=123_456.0,
                loss=0.1,
                dead_fraction=0.123,
                data_wait_fraction=0.5,
                **_rest(),
            )
        )
        with screen.capture() as shown:
            screen.print(bar._progress.get_renderable())
    assert len(shown.get().rstrip("\n").splitlines()) == 1
    assert "layer 12" in shown.get()
    assert "left" in shown.get()


def _rest() -> dict[str, float]:
    """Return what a step reports besides."""
    given = {"step", "tokens", "train_tokens", "tokens_per_second", "loss", "dead_fraction"}
    given |= {"data_wait_fraction"}
    return {name: 0.0 for name in StepReport.__annotations__ if name not in given}


def test_a_pulse_leaves_nothing_behind(screen: Screen) -> None:
    with ExplainDisplay("explain"):
        pass
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "explain" not in text.rpartition("\x1b[2K")[2]


@pytest.fixture(scope="module")
def run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bars") / "run"
    train(config(store_folder, out, {}))
    return out


def _parts(events: list[object]) -> tuple[tuple[str, ...], list[str]]:
    """Return the parts that were told, and those that came, in order."""
    (told,) = [event.names for event in events if isinstance(event, Stages)]
    after = events[events.index(Stages(told)) + 1 :]
    words = [event.what if isinstance(event, Measured) else str(event) for event in after]
    came = [next((name for name in told if each.startswith(name)), each) for each in words]
    return told, list(dict.fromkeys(came))


def test_parts_of_an_analysis_come_as_they_are_told(
    run: Path, store_folder: Path, model_folder: Path
) -> None:
    for model in (None, str(model_folder)):
        events: list[object] = []
        asked = AnalyzeConfig(
            run=run, store=store_folder, model=model, out=run / f"a-{model is None}"
        )
        analyze_run(asked, report=events.append)
        told, came = _parts(events)
        assert tuple(came) == told


def test_parts_of_an_evaluation_come_as_they_are_told(
    run: Path, store_folder: Path, model_folder: Path
) -> None:
    events: list[object] = []
    evaluate_run(
        EvalConfig(run=run, store=store_folder, model=str(model_folder)), report=events.append
    )
    told, came = _parts(events)
    assert tuple(came) == told


def test_a_bar_draws_on_a_terminal_as_the_command_line_sets_it_up() -> None:
    """Guards of two kinds lay around stderr, so each frame was spelled: <0D><1B>[2K."""
    code = (
        "import time; from lorsa.printable import guard_streams; guard_streams()\n"
        "from lorsa.display.bars import Bar, say\n"
        "with Bar('read') as bar:\n"
        "    say('one'); bar.update(1, 2, 'heads'); time.sleep(0.3)\n"
    )
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, env=_terminal(), check=True)
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "<1B>" not in drawn
    assert "\x1b[2K" in drawn
    assert "50 %" in drawn


def _terminal() -> dict[str, str]:
    return os.environ | {"TERM": "xterm", "COLUMNS": "60"}
