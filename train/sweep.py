"""Sweep: many runs by a grid of values or a list, and one table of their results.

sweep.json          a row per run, bytes read, time
sweep.csv           the same rows
pareto.png          FVU against L0
seal.json           sizes and checksums of these three
top_k=32,lr=0.001/  a run folder like any other
"""

import csv
import hashlib
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError
from ..seal import SEAL, write_seal
from ..whole import finite, whole, write_json
from .config import TrainConfig
from .report.curves import draw_pareto
from .report.events import ReportRun
from .team import all_processes
from .train import RunOutcome, train_many

MEASURES = (
    "fvu", "fvu_all", "l0", "dead_fraction", "n_features", "n_ov_heads", "train_tokens",
    "tokens_per_second",
)  # fmt: skip
MAX_NAME = 100
SWEEP = "sweep.json"


class Point(NamedTuple):
    """A run of a sweep."""

    changes: dict[str, Any]
    """Settings in which the run differs from the others"""
    config: TrainConfig | None
    """Settings of the run; None if one is refused"""
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """Result of a sweep."""

    out: str
    """Folder of the sweep."""
    rows: list[dict[str, Any]]
    """A row per run: the settings that differ, `MEASURES`, folder, error."""
    n_failed: int
    """Runs without a result."""
    n_groups: int
    """Groups of runs that shared what they read; 0 where all runs were finished before."""
    bytes_read: int
    """Bytes that all groups read from the store, in this call."""
    seconds: float
    """Seconds of this call."""
    ok: bool
    """Whether every run has a result."""


def grid(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the values of some settings; the last setting turns fastest."""
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


def points(base: Mapping[str, Any], changes: Sequence[dict[str, Any]], out: Path) -> list[Point]:
    """Make the configs of a sweep; settings out of range become the point's error.

    Args:
        base: settings that all runs share.
        changes: settings in which each differs.
        out: folder of the sweep.
    """
    found = []
    for change in changes:
        try:
            config = TrainConfig(**{**base, **change, "out": out / run_name(change)})
        except (TypeError, ValueError) as error:
            found.append(Point(change, None, str(error)))
        else:
            found.append(Point(change, config, None))
    return found


def run_name(change: Mapping[str, Any]) -> str:
    """Return the name of a run's folder: its changes, in characters that a path may have."""
    words = ",".join(f"{name}={_word(value)}" for name, value in change.items()) or "run"
    if len(words) > MAX_NAME:
        return f"{words[:MAX_NAME]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    return words


def _word(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^\w.+-]", "-", text)


def sweep(
    runs: Sequence[Point],
    out: Path,
    *,
    apart: bool = True,
    report: ReportRun = lambda event: None,
) -> SweepResult:
    """Train all runs of a sweep; those that can share a read are trained together.

    The same call resumes a sweep that was stopped, and passes over runs that are finished.

    Args:
        runs: the runs, from `points`.
        out: folder of the sweep.
        apart: with several processes, each takes whole runs, in place of a share of every step.
        report: receives each event of a run, as in `train_many`.

    Raises:
        UsageError: the settings of every run are refused.
        TrainError: no run can begin.
        KeyboardInterrupt: the process was asked to stop; checkpoints were written.
    """
    started = time.perf_counter()
    configs = [point.config for point in runs if point.config is not None]
    if not configs:
        raise UsageError(f"no run of the sweep can begin; the first: {runs[0].error}")
    outcomes = iter(train_many(configs, apart=apart, report=report))
    pairs = [(point, None if point.config is None else next(outcomes)) for point in runs]
    settings = list(dict.fromkeys(name for point in runs for name in point.changes))
    rows = [_row(settings, point, outcome) for point, outcome in pairs]
    reads = {o.group: o.bytes_read for _, o in pairs if o is not None and o.group is not None}
    n_failed = sum(row["error"] is not None for row in rows)
    return SweepResult(
        out=str(out),
        rows=rows,
        n_failed=n_failed,
        n_groups=len(reads),
        bytes_read=sum(reads.values()),
        seconds=time.perf_counter() - started,
        ok=n_failed == 0,
    )


def sweep_grid(
    base: Mapping[str, Any],
    values: Mapping[str, Sequence[Any]],
    out: str | Path,
    *,
    apart: bool = True,
    report: ReportRun = lambda event: None,
) -> SweepResult:
    """Train a dictionary for every combination of some settings; write table and plot.

    sweep_grid({"store": "acts", "layer": 12}, {"top_k": [32, 64], "lr": [1e-3, 2e-3]}, "sweep")

    Args:
        base: settings of `TrainConfig` that all runs share, but for `out`.
        values: values of the settings in which they differ.
        out: folder of the sweep.
        apart, report: as in `sweep`.

    Raises:
        UsageError: the settings of every run are refused.
        TrainError: no run can begin.
        KeyboardInterrupt: the process was asked to stop; checkpoints were written.
    """
    runs = points(base, grid(values), Path(out))
    result = sweep(runs, Path(out), apart=apart, report=report)
    config = next(point.config for point in runs if point.config is not None)
    if all_processes(config).is_main:
        write_sweep(result)
    return result


def write_sweep(result: SweepResult) -> None:
    """Write table and plot of a sweep into its folder.

    Raises:
        OSError: the disk does not take them.
    """
    out = Path(result.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / SEAL).unlink(missing_ok=True)
    write_json(out / SWEEP, asdict(result))
    write_csv(result.rows, out / "sweep.csv")
    draw_pareto(result.rows, out / "pareto.png")
    write_seal(out, (SWEEP, "sweep.csv", "pareto.png"))


def _row(settings: Sequence[str], point: Point, outcome: RunOutcome | None) -> dict[str, Any]:
    """Return a run's row; every row has the same columns."""
    row: dict[str, Any] = {}
    for name in settings:
        otherwise = None if point.config is None else getattr(point.config, name)
        row[name] = point.changes.get(name, otherwise)
    result = None if outcome is None or outcome.result is None else asdict(outcome.result)
    row |= {name: None if result is None else result[name] for name in MEASURES if name not in row}
    row["run"] = None if point.config is None else str(point.config.out)
    failure = None if outcome is None or outcome.failure is None else str(outcome.failure)
    row["error"] = point.error or failure
    return finite(row)  # type: ignore[no-any-return]


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows under the names of all their columns, in the order of their first mention.

    Args:
        rows: a row per run; what a row lacks or has as None is left empty.
        path: the file, written whole or not at all.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
