"""How large a page is, and how soon its views are there, in Chromium from the disk.

    PYTHONPATH=tests python benchmarks/bench_page.py --json
    PYTHONPATH=tests python benchmarks/bench_page.py --write

Analyses are made up: heads with 16 top examples and 8 samples each, of 12 sources, in sequences of
256 tokens drawn by Zipf's law from a vocabulary of 20,000. Contexts of 576 heads are drawn and
repeated; no data file holds the same context twice, so repeating saves no bytes.

    first view   from the request for index.html until the overview is drawn
    table        from the click on "Heads" until its rows are there, sorted by frequency
    search       from the address of a search by token until its rows are there, the first one
    head         from the address of a head until its contexts and arcs are drawn, each head of
                 another file

Each number is the median over fresh windows, with an empty cache of the browser; the files are in
the page cache of the system. Times are by the page's own clock, and end two animation frames after
the content is in the document.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from browser import chromium
from lorsa import __version__
from lorsa.analyze.result import write_analysis
from lorsa.analyze.schema import TABLES
from lorsa.view.build import build_page
from playwright.sync_api import Browser

from reading import make_analysis

RESULTS = Path(__file__).parent / "results" / "bench_page.md"
SIZES = (4_608, 32_768)
DRAWN = 576
VOCABULARY = 20_000
ARRIVES = """async ([address, sign]) => {
    const frame = () => new Promise(requestAnimationFrame);
    const start = address ? performance.now() : 0;  // 0 is when the page was asked for
    if (address) location.hash = address;
    while (!document.querySelector(sign)) await frame();
    await frame();
    await frame();
    return (performance.now() - start) / 1000;
}"""


class Row(NamedTuple):
    """What was measured of a page."""

    heads: int
    contexts: int
    build_s: float
    megabytes: float
    files: int
    first_view_s: float
    table_s: float
    search_s: float
    head_s: float
    head_worst_s: float


def make_large(root: Path, drawn: Path, n_heads: int) -> Path:
    """Write an analysis of many heads whose examples are those of a smaller one, repeated."""
    tables = {name: pq.read_table(drawn / f"{name}.parquet") for name in TABLES}
    times = -(-n_heads // DRAWN)
    for name in ("heads", "examples"):
        once = _below(tables[name], DRAWN)
        parts = [_shifted(once, DRAWN * i) for i in range(times)]
        tables[name] = _below(pa.concat_tables(parts), n_heads)
    facts = json.loads((drawn / "analysis.json").read_text("utf-8"))
    write_analysis(root, facts | {"n_ov_heads": n_heads}, tables)
    return root


def _below(table: pa.Table, n_heads: int) -> pa.Table:
    return table.filter(table["head"].to_numpy() < n_heads)


def _shifted(table: pa.Table, by: int) -> pa.Table:
    heads = pa.array(table["head"].to_numpy() + np.int32(by))
    return table.set_column(table.schema.get_field_index("head"), "head", heads)


def measure(browser: Browser, index: Path, n_heads: int, rounds: int) -> dict[str, Any]:
    """Return medians of the times of each view, in seconds."""
    found: dict[str, list[float]] = {"first_view": [], "table": [], "search": [], "head": []}
    for number in range(rounds):
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto(index.resolve().as_uri(), wait_until="commit")
        head = (number * 1_009 + 7) % (n_heads - 1)
        for name, address, sign in (
            ("first_view", "", "html[data-ready=yes]"),
            ("table", "#/heads?sort=-frequency", ".rows .row"),
            ("search", "#/heads?q=promotes:+w77", ".chip"),
            ("head", f"#/head/{head}", ".arc"),
        ):
            found[name].append(page.evaluate(ARRIVES, [address, sign]))
        page.close()
    medians = {f"{name}_s": statistics.median(times) for name, times in found.items()}
    return medians | {"head_worst_s": max(found["head"])}


def run(folder: Path, rounds: int) -> list[Row]:
    """Make a page of each size and measure it."""
    words = [f" w{i}" for i in range(VOCABULARY)]
    drawn = make_analysis(
        folder / "drawn",
        n_heads=DRAWN + 1,
        n_top=16,
        n_sample=8,
        n_seq=1_500,
        n_ctx=256,
        n_sources=12,
        words=words,
    )
    rows = []
    with chromium() as browser:
        for n_heads in SIZES:
            analysis = make_large(folder / str(n_heads), drawn, n_heads)
            start = time.perf_counter()
            page = build_page(analysis, folder / f"page-of-{n_heads}")
            took = time.perf_counter() - start
            times = measure(browser, page.file, n_heads, rounds)
            size = page.n_bytes / 1e6
            rows.append(Row(n_heads, 24 * n_heads, took, size, page.n_files, **times))
    return rows


def _table(rows: list[Row]) -> str:
    lines = [
        "| heads | contexts | build | size | files | first view | table | search | head | worst |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = [row.first_view_s, row.table_s, row.search_s, row.head_s, row.head_worst_s]
        lines.append(
            f"| {row.heads:,} | {row.contexts:,} | {row.build_s:.0f} s | {row.megabytes:.1f} MB "
            f"| {row.files:,} | " + " | ".join(f"{second:.2f} s" for second in seconds) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and with --write keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="windows opened for each size")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), asked.rounds)
    print(json.dumps([row._asdict() for row in rows]) if asked.json else _table(rows))
    if asked.write:
        RESULTS.write_text(
            "# A page's size and speed\n\n"
            f"{datetime.now(UTC):%Y-%m-%d}, lorsa {__version__}, {os.cpu_count()} CPU cores "
            f"({platform.machine()}), Chromium without a GPU, load of others on the machine "
            f"{os.getloadavg()[1]:.1f}, medians of {asked.rounds} windows.\n\n"
            "    PYTHONPATH=tests python benchmarks/bench_page.py --write\n\n"
            f"{_table(rows)}\n",
            "utf-8",
        )


if __name__ == "__main__":
    main()
