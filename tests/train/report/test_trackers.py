"""What a tracker is told comes back from it; what it cannot take does not stop a run."""

import json
import math
import sys
import types
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from lorsa.errors import TrainError
from lorsa.train.report import trackers as module
from lorsa.train.report.trackers import Tracker, flat, open_tracker, require_tracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Accelerator(cpu=True)  # accelerate's trackers ask which process this is
CONFIG = {"layer": 3, "n_ov_heads": None, "betas": [0.9, 0.95]}


def _open(name: str, **settings: Any) -> Tracker:
    return open_tracker(name, config=CONFIG, **settings)


def _scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_holds_what_it_was_told_of_each_run(tmp_path: Path) -> None:
    """Two runs of one process at a time."""
    runs = [tmp_path / name for name in ("layer-1", "layer-2")]
    trackers = [_open("tensorboard", run=run) for run in runs]
    for step in (10, 20):
        for i, tracker in enumerate(trackers):
            tracker.log({"step": step, "loss": step / 16 + i, "grad_norm": math.inf}, step)
            tracker.log({"step": step, "held_out": {"fvu": 0.25, "l0": None}}, step)
    for tracker in trackers:
        tracker.close()
    for i, run in enumerate(runs):
        assert _scalars(run) == {
            "loss": [(10, 0.625 + i), (20, 1.25 + i)],
            "held_out/fvu": [(10, 0.25), (20, 0.25)],
        }
    events = EventAccumulator(str(runs[0] / "tensorboard")).Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == CONFIG


def test_a_run_that_goes_on_is_one_curve(tmp_path: Path) -> None:
    for first, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        tracker = _open("tensorboard", run=tmp_path, first_step=first)
        for step in steps:
            tracker.log({"loss": float(step)}, step)
        tracker.close()
    assert _scalars(tmp_path)["loss"] == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0)]


CURRENT: ContextVar[Any] = ContextVar("current", default=None)


class Service:
    """Stands for wandb and trackio: keeps what is told to it."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def init(self, **settings: Any) -> types.SimpleNamespace:
        print("welcome")
        if (before := CURRENT.get()) is not None:  # as trackio does
            before.finish()
        run: dict[str, Any] = {"settings": settings, "lines": [], "finished": False}
        self.runs.append(run)
        found = types.SimpleNamespace(
            log=lambda values, step: run["finished"] or run["lines"].append((step, values)),
            finish=lambda: run.update(finished=True),
        )
        CURRENT.set(found)
        return found


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    for name in ("wandb", "trackio"):
        stub: Any = types.ModuleType(name)
        stub.init = found.init
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    return found


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_told_of_each_run(
    service: Service, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of both at a time, and what a service prints is no part of the result on stdout."""
    runs = [tmp_path / "sweep" / each for each in ("a", "b")]
    for run in runs:
        run.mkdir(parents=True)
    trackers = [_open(name, run=run) for run in runs]
    for i, tracker in enumerate(trackers):
        tracker.log({"step": 10, "loss": float(i)}, 10)
        tracker.close()
    for i, run in enumerate(service.runs):
        assert run["settings"]["project"] == "lorsa"
        assert run["settings"]["config"] == CONFIG
        assert run["settings"]["name"].endswith("ab"[i])
        assert run["lines"] == [(10, {"loss": float(i)})]
        assert run["finished"]
    assert capsys.readouterr().out == ""


def test_wandb_goes_on_with_its_run_and_begins_a_new_one(service: Service, tmp_path: Path) -> None:
    for first_step in (0, 20, 0):
        _open("wandb", run=tmp_path, first_step=first_step).close()
    first, second, third = (run["settings"]["id"] for run in service.runs)
    assert first == second != third


def test_a_tracker_that_fails_is_left_alone_and_said_once(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    tracker = _open("wandb", run=tmp_path, report=said.append)
    service.runs[0]["lines"] = None  # no list to append to
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert len(said) == 1
    assert said[0].startswith("wandb takes no more numbers (")


def test_one_that_does_not_start_is_a_line(service: Service, tmp_path: Path) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no\nnetwork")

    sys.modules["wandb"].init = refuse  # type: ignore[attr-defined]
    with pytest.raises(TrainError, match=r"wandb does not start \(no network\).*WANDB_MODE"):
        _open("wandb", run=tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    require_tracker("none")
    with pytest.raises(TrainError, match="run: pip install trackio"):
        require_tracker("trackio")
    with pytest.raises(ValueError, match="allowed: none, tensorboard, wandb, trackio"):
        require_tracker("mlflow")


def test_none_writes_nothing(tmp_path: Path) -> None:
    tracker = _open("none", run=tmp_path)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_those_that_are_finite() -> None:
    line = {"step": 3, "loss": math.nan, "look": {"fvu": 0.5, "name": "x"}, "ok": True}
    assert flat(line) == {"step": 3, "look/fvu": 0.5, "ok": True}
