"""Flipped bits and killed commands: what comes of each, counted.

    PYTHONPATH=tests python benchmarks/bench_damage.py --write

Flips: one bit of one file of a small store, run, analysis, page or shared folder, half the time of
any file, else of any byte. Then all that users do with it (tests/flips.py): each must give what it
gave before, or a line that names the file. Kills: a command is killed by SIGKILL, half the time
before an operation on a file, else at any moment, and typed again (tests/kills.py): all that is
written must be what it is without the kill, and `lorsa verify --full` must find nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import drills
import flips
import kills
from chat_stub import Stub
from measure import RESULTS, append_row

TABLE = RESULTS / "bench_damage.md"
FLIPS, FEW_FLIPS, KILLS = 300, 60, 204
MOST = ("a store", "a run", "an analysis", "a pushed folder")
"""Cases of 300 flips; the others have 60."""


def main() -> int:
    args = parse()
    rows: list[tuple[object, ...]] = []
    bad = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Stub() as stub:
        os.environ["DRILL_ENDPOINT"] = stub.url
        root = Path(folder, "prepared")
        drills.prepare(root)
        for name in flips.CASES if args.cases is None else args.cases:
            n = round((FLIPS if name in MOST else FEW_FLIPS) * args.share)
            outcomes = flips.drill(root, Path(folder, "flips"), name, max(1, n), args.seed)
            counts = Counter(each.verdict for each in outcomes)
            good = counts["same"] + counts["told"]
            rows.append((f"flips of {name}", len(outcomes), good, counts["same"], counts["told"]))
            bad += say(rows[-1], [e for e in outcomes if e.verdict not in ("same", "told")])
        for name in kills.COMMANDS if args.commands is None else args.commands:
            n = max(1, round(KILLS * args.share / len(kills.COMMANDS)))
            found = kills.drill(root, Path(folder, "kills"), name, n, args.seed)
            wrong = [each for each in found if each.problem]
            rows.append((f"kills of {name}", n, n - len(wrong), "-", "-"))
            bad += say(rows[-1], wrong)
    if args.write:
        for row in rows:
            append_row(TABLE, (*row, args.seed))
    print(f"{bad} not as they must be, {time.monotonic() - started:.0f} s")
    return 1 if bad else 0


def say(row: tuple[object, ...], wrong: Sequence[object]) -> int:
    """Print a row and what is not as it must be; return how much that is."""
    print(*row, flush=True)
    for each in wrong:
        print("   ", each, flush=True)
    return len(wrong)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0, help="of all flips and kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", help=f"none, or of {', '.join(flips.CASES)}")
    parser.add_argument("--commands", nargs="*", help=f"none, or of {', '.join(kills.COMMANDS)}")
    parser.add_argument("--write", action="store_true", help=f"append to {TABLE.name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
