"""A sweep against the same runs one by one: wall time, bytes read, the same Lorsas.

    python benchmarks/bench_sweep.py --store FOLDER --layer 12 --train-tokens 122880

Six runs (top_k 32, 64, 128 by learning rate 1e-3, 2e-3) as one command, and as six commands, each a
process of its own as a user would type it: three before the sweep and three after it, so that a
machine which changes its speed changes both.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import append_row, machine

RESULTS = Path(__file__).parent / "results" / "bench_sweep.md"
TOP_K = (32, 64, 128)
LR = (1e-3, 2e-3)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        grid = [(top_k, lr) for top_k in TOP_K for lr in LR]
        singles = [single(args, out, *run) for run in grid[::2]]
        more = ["--out", str(out / "sweep"), "--top-k", ",".join(map(str, TOP_K))]
        swept = run_command(args, "sweep", [*more, "--lr", ",".join(map(str, LR))])
        singles += [single(args, out, *run) for run in grid[1::2]]
        one = bytes_of_one(args, out)
    result = compare(args, grid, singles, swept, one)
    if args.write:
        write_row(result)
    print(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--train-tokens", type=int, default=122_880)
    parser.add_argument("--write", action="store_true", help=f"append a row to {RESULTS.name}")
    return parser.parse_args()


def run_command(args: argparse.Namespace, command: str, more: list[str]) -> dict[str, Any]:
    """Run a command in a process of its own; return its result and how long it took."""
    words = [sys.executable, "-m", "lorsa", command, "--store", args.store]
    words += ["--layer", str(args.layer), "--train-tokens", str(args.train_tokens), "--json", *more]
    started = time.perf_counter()
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout), "wall_s": time.perf_counter() - started}


def single(args: argparse.Namespace, out: Path, top_k: int, lr: float) -> dict[str, Any]:
    """Train one of the runs alone."""
    folder = out / f"{top_k}-{lr}"
    more = ["--out", str(folder), "--top-k", str(top_k), "--lr", str(lr)]
    result = run_command(args, "train", more)
    return {**result["runs"][0], "wall_s": result["wall_s"], "lr": lr}


def bytes_of_one(args: argparse.Namespace, out: Path) -> int:
    """Return what one run reads, as a sweep of one."""
    more = ["--out", str(out / "one"), "--top-k", str(TOP_K[0]), "--lr", str(LR[0])]
    n_bytes: int = run_command(args, "sweep", more)["bytes_read"]
    return n_bytes


def compare(
    args: argparse.Namespace,
    grid: list[tuple[int, float]],
    singles: list[dict[str, Any]],
    swept: dict[str, Any],
    one: int,
) -> dict[str, Any]:
    alone = {(run["top_k"], run["lr"]): run for run in singles}
    together = {(row["top_k"], row["lr"]): row for row in swept["rows"]}
    singles_s = sum(run["wall_s"] for run in singles)
    return {
        "runs": len(grid),
        "train_tokens": singles[0]["train_tokens"],
        "sweep_s": swept["wall_s"],
        "singles_s": singles_s,
        "ratio": swept["wall_s"] / singles_s,
        "sweep_bytes": swept["bytes_read"],
        "one_run_bytes": one,
        "largest_fvu_difference": max(abs(alone[k]["fvu"] - together[k]["fvu"]) for k in grid),
        "machine": machine("torch", "lorsa"),
        "layer": args.layer,
    }


def write_row(result: dict[str, Any]) -> None:
    row = [
        result["runs"],
        f"{result['train_tokens']:,}",
        f"{result['singles_s']:.0f}",
        f"{result['sweep_s']:.0f}",
        f"{result['ratio']:.2f}",
        f"{result['one_run_bytes'] / 1e6:,.1f}",
        f"{result['sweep_bytes'] / 1e6:,.1f}",
        f"{result['largest_fvu_difference']:.1e}",
        result["machine"],
    ]
    append_row(RESULTS, row)


if __name__ == "__main__":
    main()
