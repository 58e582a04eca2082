"""Machine, memory and table rows of the benchmarks; imports nothing of lorsa by itself."""

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str, device: str = "cpu") -> str:
    """Return the device, the processor, and the versions of Python and of packages."""
    gpu = device.startswith("cuda")
    what = import_module("torch").cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores"
    versions = [f"{name} {import_module(name).__version__}" for name in packages]
    return ", ".join([what, platform.machine(), f"Python {platform.python_version()}", *versions])


def append_row(table: Path, cells: Iterable[object]) -> None:
    """Append a row to a table in Markdown: today's date, then the cells."""
    row = [f"{datetime.now(UTC):%Y-%m-%d}", *map(str, cells)]
    with table.open("a", encoding="utf-8") as file:
        file.write(f"| {' | '.join(row)} |\n")


def resident_mb() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def busy_s() -> float:
    """Return the CPU seconds that all processes of this machine have used since it was started."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")
