"""What it takes to install lorsa and to start it: bytes, seconds, packages.

    python benchmarks/bench_install.py                            # ours
    python benchmarks/bench_install.py --beside THEIR_PYTHON      # and the reference implementation
    python benchmarks/bench_install.py --write                    # append rows to the results

A wheel of this folder is installed into a new environment with the versions of constraints.txt;
the reference implementation (see reference_smollm2.py) into another, with the versions that
THEIR_PYTHON has. Both take what pip can from its cache, which a first install fills and a second is
timed with. Bytes are those of the files in site-packages, compiled modules included; pip itself is
left out. Torch is what torch and the packages of NVIDIA and Triton take.

Seconds of a start are medians of --rounds starts of a new process after one that is not counted;
*pass* is `python -c pass` and *torch* `python -c 'import torch'` in the same environment, in turn
with the others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from measure import machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "bench_install.md"
REFERENCE = "llamascopium"
TORCH = ("torch", "functorch", "nvidia", "cuda", "triton")


class Row(NamedTuple):
    """What was measured of a package."""

    name: str
    wheel_kb: float
    """Of the package itself"""
    n_packages: int
    install_s: float
    megabytes: float
    besides_torch_mb: float
    pass_s: float
    torch_s: float
    import_s: float
    help_s: float


def installed(folder: Path, requirement: str, constraints: Path) -> tuple[Path, float]:
    """Install into a new environment; return its python and the seconds of `pip install`."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    command: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    command += ["--constraint", constraints, requirement]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return python, time.perf_counter() - started


def site_packages(python: Path) -> Path:
    """Return the folder of what is installed."""
    (found,) = python.parent.parent.glob("lib/python*/site-packages")
    return found


def n_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def sizes(python: Path) -> tuple[int, float, float]:
    """Return how many packages are installed, their MB, and those besides torch."""
    entries = [
        entry
        for entry in site_packages(python).iterdir()
        if not entry.name.startswith(("pip", "setuptools", "pkg_resources", "_distutils_hack"))
    ]
    of_torch = sum(n_bytes(entry) for entry in entries if entry.name.startswith(TORCH))
    total = sum(map(n_bytes, entries))
    n_packages = sum(entry.suffix == ".dist-info" for entry in entries)
    return n_packages, total / 1e6, (total - of_torch) / 1e6


def starts(python: Path, name: str, rounds: int) -> list[float]:
    """Return seconds of `pass`, `import torch`, the package's import and its --help."""
    commands: list[list[object]] = [
        [python, "-c", "pass"],
        [python, "-c", "import torch"],
        [python, "-c", f"import {name}"],
        [python.with_name(name), "--help"],
    ]
    taken: list[list[float]] = [[] for _ in commands]
    for _ in range(rounds + 1):
        for seconds, command in zip(taken, commands, strict=True):
            started = time.perf_counter()
            words = [str(word) for word in command]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds[1:]) for seconds in taken]


def measure(name: str, wheel: Path, constraints: Path, requirement: str, rounds: int) -> Row:
    """Install a package twice and measure the second one."""
    with tempfile.TemporaryDirectory() as folder:
        installed(Path(folder) / "first", requirement, constraints)
    with tempfile.TemporaryDirectory() as folder:
        python, install_s = installed(Path(folder) / "second", requirement, constraints)
        n_packages, total, besides = sizes(python)
        seconds = starts(python, name, rounds)
        version = subprocess.run(
            [python, "-c", f"from importlib.metadata import version as v; print(v('{name}'))"],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        ).stdout.strip()
    kb = wheel.stat().st_size / 1e3
    return Row(f"{name} {version}", kb, n_packages, install_s, total, besides, *seconds)


def ours(folder: Path, rounds: int) -> Row:
    """Build a wheel of this folder and measure it."""
    subprocess.run([sys.executable, ROOT / "tests" / "release.py", "--build", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    return measure("lorsa", wheel, ROOT / "constraints.txt", str(wheel), rounds)


def theirs(folder: Path, python: Path, rounds: int) -> Row:
    """Measure the reference implementation with the versions of an environment that has it."""
    freeze: list[str | Path] = [python, "-m", "pip", "freeze"]
    frozen = subprocess.run(freeze, check=True, text=True, stdout=subprocess.PIPE).stdout
    constraints = folder / "versions.txt"
    constraints.write_text(frozen, "utf-8")
    (requirement,) = [line for line in frozen.splitlines() if line.startswith(f"{REFERENCE}==")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
    subprocess.run(command, check=True, cwd=folder)
    (wheel,) = folder.glob(f"{REFERENCE}*.whl")
    return measure(REFERENCE, wheel, constraints, requirement, rounds)


def line(row: Row) -> str:
    """Return a row of the table of results."""
    cells = [
        f"{datetime.now(UTC):%Y-%m-%d}",
        row.name,
        f"{row.wheel_kb:,.0f} kB",
        f"{row.n_packages}",
        f"{row.install_s:.0f} s",
        f"{row.megabytes:,.0f} MB",
        f"{row.besides_torch_mb:,.0f} MB",
        *(f"{s:.2f} s" for s in (row.pass_s, row.torch_s, row.import_s, row.help_s)),
        f"{row.help_s / row.pass_s:.1f}",
        f"{row.help_s / row.torch_s:.2f}",
        f"{machine()}, load of others {os.getloadavg()[2]:.1f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Measure, print, and with --write keep the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beside", type=Path, help="python that has the reference installed")
    parser.add_argument("--rounds", type=int, default=7, help="starts of each command")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help=f"append rows to {RESULTS.name}")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows.append(ours(Path(folder), asked.rounds))
    if asked.beside is not None:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(theirs(Path(folder), asked.beside, asked.rounds))
    if asked.write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.writelines(map(line, rows))
    if asked.json:
        print(json.dumps({"rows": [row._asdict() for row in rows]}))
    else:
        print("".join(map(line, rows)), end="")


if __name__ == "__main__":
    main()
