"""Seconds until commands that touch no tensor say something, and until they end.

    PYTHONPATH=tests python benchmarks/bench_startup.py --store ./acts --run runs/layer-12
    PYTHONPATH=tests python benchmarks/bench_startup.py --write

Medians over rounds of fresh processes, files in the page cache of the system:

    first    wall time from the start of the process to its first byte on stdout or stderr
    end      wall time to its end
    CPU      CPU time to its end, user and system, which the load of others hardly changes
    ratio    CPU time in that of `python -c pass`

"help" is the slowest of the help of all commands. Without --run an analysis is made up; what takes
a store, or a Lorsa, is then left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lorsa import __version__, cli
from measure import RESULTS, machine

from reading import make_analysis

TABLE = RESULTS / "bench_startup.md"
HEADS = 2_000


class Row(NamedTuple):
    """What was measured of a command."""

    command: str
    first_s: float
    end_s: float
    cpu_s: float
    ratio: float


def once(words: list[str]) -> tuple[float, float, float]:
    """Return seconds to the first byte, to the end, and of CPU, of a process."""
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.read(1)
    first = time.perf_counter() - start
    process.stdout.read()
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(words)} failed")
    end, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system
    return first, end, cpu - before.children_user - before.children_system


def measure(commands: dict[str, list[str]], rounds: int) -> list[Row]:
    """Return the medians of each command, in turn, so that load falls on all alike."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, words in commands.items():
            taken = once(words)
            if number:  # the first fills caches
                found[name].append(taken)
    rows = []
    for name, times in found.items():
        first, end, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(Row(name, first, end, cpu, cpu))
    base = next(row.cpu_s for row in rows if row.command == "python -c pass")
    return [row._replace(ratio=row.cpu_s / base) for row in rows]


def commands_of(store: str | None, run: Path | None, folder: Path) -> dict[str, list[str]]:
    """Return command lines by the names that the table has for them."""
    lorsa = [sys.executable, "-m", "lorsa"]
    analysed = run or folder / "run"
    if run is None:
        make_analysis(analysed / "analysis", n_heads=HEADS)
    reads = f"import lorsa; print(lorsa.Analysis.open({str(analysed)!r}).heads.num_rows)"
    page = ["view", str(analysed), "--out", str(folder / "page")]
    found = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "find": [*lorsa, "find", "local", str(analysed), "--least", "0"],
        "view, up to date": [*lorsa, *page],
        "Analysis.open": [sys.executable, "-c", reads],
    }
    if store is not None:
        found["store info"] = [*lorsa, "store", "info", store]
    if run is not None:
        repo = str(folder / "shared")
        found["push --dry-run"] = [*lorsa, "push", str(run), "--repo", repo, "--dry-run"]
    return found


def slowest_help(rounds: int) -> Row:
    """Return what the help of the command takes that takes longest."""
    names = ["", *cli.COMMANDS, *(f"store {name}" for name in cli.STORE_COMMANDS)]
    lines = {name: [sys.executable, "-m", "lorsa", *name.split(), "--help"] for name in names}
    rows = measure({"python -c pass": [sys.executable, "-c", "pass"], **lines}, rounds)
    worst = max(rows, key=lambda row: row.end_s)
    return worst._replace(command=f"help (slowest: {worst.command})")


def write(rows: list[Row]) -> None:
    """Write the table."""
    load = os.getloadavg()[0]
    lines = [
        "# Start of commands that touch no tensor",
        "",
        f"lorsa {__version__}, {machine('pyarrow', 'typer')}, load of others {load:.1f}; medians.",
        "",
        "    PYTHONPATH=tests python benchmarks/bench_startup.py --write",
        "",
        "| command | first output | end | CPU | in CPU times of `python -c pass` |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.command}` | {r.first_s:.2f} s | {r.end_s:.2f} s | {r.cpu_s:.2f} s | {r.ratio:.1f} |"
        for r in rows
    ]
    TABLE.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", help="store whose facts are read")
    parser.add_argument("--run", type=Path, help="analysed run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the table of results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = commands_of(asked.store, asked.run, Path(folder))
        rows = [*measure(commands, asked.rounds), slowest_help(asked.rounds)]
    print(json.dumps([row._asdict() for row in rows], indent=1))
    if asked.write:
        write(rows)


if __name__ == "__main__":
    main()
