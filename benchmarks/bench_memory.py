"""Whether a long training run keeps its memory: resident memory over 10,000 steps.

    python benchmarks/bench_memory.py --store FOLDER --layer 12 --write

A small Lorsa, many short steps over many epochs, with evals and checkpoints on the way, so that
whatever leaks a little at a time has leaked thousands of times at the end.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import StepReport
from lorsa.train.train import train
from measure import append_row, machine

RESULTS = Path(__file__).parent / "results" / "bench_memory.md"
SETTLED_STEPS = 1000
"""After these, everything that is made once has been made."""


def main() -> None:
    args = parse()
    process, samples = psutil.Process(), list[tuple[int, int]]()

    def report(event: Any) -> None:
        if isinstance(event, StepReport):
            samples.append((event.step, process.memory_info().rss))

    n_ctx = ActivationStore.open(args.store).manifest.n_ctx
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            store=args.store,
            layer=args.layer,
            out=Path(folder) / "run",
            n_ov_heads=args.heads,
            n_qk_heads=args.qk_heads,
            top_k=8,
            batch_tokens=n_ctx,
            train_tokens=args.steps * n_ctx,
            init_tokens=8 * n_ctx,
            eval_tokens=n_ctx,
            eval_every_tokens=500 * n_ctx,
            checkpoint_every_tokens=500 * n_ctx,
        )
        train(config, report=report)
    settled = [rss for step, rss in samples if step > SETTLED_STEPS]
    middle = len(settled) // 2
    result = {
        "steps": args.steps,
        "rss_settled_mb": settled[0] / 1e6,
        "rss_first_half_mb": max(settled[:middle]) / 1e6,
        "rss_second_half_mb": max(settled[middle:]) / 1e6,
        "growth_bytes_per_step": _slope([s for s in samples if s[0] > SETTLED_STEPS]),
        "seconds": time.perf_counter() - started,
        "machine": machine("torch", "lorsa"),
    }
    if args.write:
        write_row(result)
    print(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--heads", type=int, default=144)
    parser.add_argument("--qk-heads", type=int, default=9)
    parser.add_argument("--write", action="store_true", help=f"append a row to {RESULTS.name}")
    return parser.parse_args()


def _slope(samples: list[tuple[int, int]]) -> float:
    """Return the least-squares slope, bytes per step."""
    n = len(samples)
    step = sum(s for s, _ in samples) / n
    rss = sum(r for _, r in samples) / n
    spread = sum((s - step) ** 2 for s, _ in samples)
    return sum((s - step) * (r - rss) for s, r in samples) / spread


def write_row(result: dict[str, Any]) -> None:
    row = [
        f"{result['steps']:,}",
        f"{result['rss_settled_mb']:.1f}",
        f"{result['rss_first_half_mb']:.1f}",
        f"{result['rss_second_half_mb']:.1f}",
        f"{result['growth_bytes_per_step']:+.0f}",
        f"{result['seconds']:.0f}",
        result["machine"],
    ]
    append_row(RESULTS, row)


if __name__ == "__main__":
    main()
