"""Trackers: metrics sent to TensorBoard, Weights & Biases or trackio through accelerate.

A tracker belongs to one run, so that a process which trains several at once has one for each. It
receives the lines of metrics.jsonl. A tracker that fails in mid-run is reported once and left out;
the run goes on.
"""

import json
import math
import sys
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout
from contextvars import copy_context
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from ...errors import TrainError
from ...reading import read_json
from ..config import TRACKERS

PROJECT = "lorsa"
"""Project of the runs in Weights & Biases and trackio."""
ID = "tracker.json"
"""File with the id of the run in Weights & Biases, by which it resumes."""


class Tracker:
    """Tracker of one run, which receives the lines of metrics.jsonl; "none" drops them."""

    def __init__(self, name: str, behind: Any, report: Callable[[str], None]) -> None:
        """Use `open_tracker`."""
        self._name = name
        self._behind = behind
        self._report = report

    def log(self, line: dict[str, Any], step: int) -> None:
        """Send the finite numbers of a line; those of a table in it as table/number."""
        numbers = flat(line)
        numbers.pop("step", None)
        self._do(lambda behind: behind.log(numbers, step=step))

    def close(self) -> None:
        """Close the tracker; to be called once, after an error too."""
        self._do(lambda behind: behind.finish())
        self._behind = None

    def _do(self, work: Callable[[Any], Any]) -> None:
        if self._behind is None:
            return
        try:
            with redirect_stdout(sys.stderr):  # stdout is for the result
                work(self._behind)
        except Exception as error:  # another package's, and no reason to lose a run
            self._behind = None
            self._report(f"{self._name} takes no more numbers ({_line(error)}); the run goes on")


def require_tracker(name: str) -> None:
    """Require that a tracker can be opened.

    Raises:
        ValueError: no such tracker.
        TrainError: its package is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"tracker is {name!r}; allowed: {', '.join(TRACKERS)}")
    if name != "none" and find_spec(name) is None:
        raise TrainError(f"tracker is {name}, which is not installed; run: pip install {name}")


def open_tracker(
    name: str,
    *,
    run: Path,
    config: dict[str, Any],
    first_step: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> Tracker:
    """Return a tracker of a run.

    Args:
        name: name of the tracker, of TRACKERS.
        run: run folder, which gives the tracker's run its name.
        config: settings to keep with the run; JSON-able.
        first_step: steps done already; what a tracker has of later ones is done again.
        report: receives a line if the tracker fails.

    Raises:
        ValueError: no such tracker.
        TrainError: its package is not installed, or it does not start.
    """
    require_tracker(name)
    if name == "none":
        return Tracker(name, None, report)
    try:
        behind = _BEGIN[name](run, config, first_step)
        with redirect_stdout(sys.stderr):
            # trackio ends the run that its context knows: each begins in a context of its own
            copy_context().run(behind.start)
        if name == "tensorboard":
            behind.log({"config": f"    {json.dumps(config, indent=4)}"}, step=first_step)
    except Exception as error:  # of any kind: no account, no network, no disk
        raise TrainError(
            f"{name} does not start ({_line(error)}); put it right, or leave out --tracker"
            + (", or set WANDB_MODE=offline" if name == "wandb" else "")
        ) from error
    return Tracker(name, behind, report)


def _tensorboard(run: Path, _config: dict[str, Any], first_step: int) -> Any:
    kept = first_step + 1 if first_step else 0  # what the tracker has from this step on is dropped
    return _everywhere(TensorBoardTracker)("tensorboard", run, purge_step=kept)


def _wandb(run: Path, config: dict[str, Any], first_step: int) -> Any:
    path = run / ID
    if first_step == 0 or not path.exists():
        path.write_text(json.dumps({"wandb": uuid.uuid4().hex[:12]}) + "\n", "utf-8")
    return _everywhere(WandBTracker)(
        PROJECT,
        name=run.name,
        group=run.parent.name or None,
        id=read_json(path)["wandb"],
        resume="allow",
        reinit="create_new",  # beside other runs of this process
        dir=str(run),
        config=config,
    )


def _trackio(run: Path, config: dict[str, Any], first_step: int) -> Any:
    resume = "allow" if first_step else "never"
    return _everywhere(TrackioTracker)(
        PROJECT, name=f"{run.parent.name}/{run.name}", config=config, resume=resume, embed=False
    )


def _everywhere(kind: type[Any]) -> type[Any]:
    """Return a kind of tracker that also works on other processes, which have runs of their own."""
    return type(kind.__name__, (kind,), {"main_process_only": False})


_BEGIN: dict[str, Callable[[Path, dict[str, Any], int], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def flat(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of a line; those of a table in it as table/number."""
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers[prefix + name] = value
    return numbers


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
