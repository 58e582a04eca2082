"""Seconds until a Lorsa is as good as the reference implementation's at the end of its run.

    PYTHONPATH=benchmarks python benchmarks/once/time_to_quality.py --store STORE --write

The setting of quality_smollm2.py, in which the reference implementation (Llamascopium 2.0.0b34)
came to a held-out FVU of 0.239 with 180 steps of 2,048 tokens. Runs of a few lengths by the default
recipe, each with a schedule of its own; the shortest that reaches the target counts. Seconds run
from the call to the last step: opening the store, initialisation and a first look included, the
final measurement of all held-out tokens not.

Machines differ and are shared, so time is also told in dense steps (dense_baseline.py: forward,
backward and Adam on 2,048 tokens). One is timed at every report of the run, all through it, while
the run's clock stands still. The reference's 180 steps are taken to be no slower than dense ones,
which favours it.
"""

import argparse
import json
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step import make_step
from lorsa.display.train import TrainDisplay
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import StepReport, TrainEvent
from lorsa.train.train import train
from measure import append_row, machine
from rooflines import milliseconds
from step_cases import make_case

RESULTS = Path(__file__).parent.parent / "results" / "time_to_quality.md"
TARGET_FVU = 0.239
REFERENCE_STEPS = 180


def main() -> None:
    args = parse()
    case = make_case("smollm2", device="cpu")
    dense = make_step("dense", case)

    def dense_seconds() -> float:
        return milliseconds(dense, torch.device("cpu")) / 1e3

    dense_seconds()  # warm
    for tokens in args.tokens:
        result = measure(args, tokens, dense_seconds)
        result["dense_steps"] = result["seconds_to_last_step"] / result["dense_step_seconds"]
        result["share_of_reference"] = result["dense_steps"] / REFERENCE_STEPS
        print(json.dumps(result))
        if args.write:
            write_row(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[92_160, 122_880, 184_320],
        help="lengths of the runs",
    )
    parser.add_argument("--set", action="append", default=[], help="change a setting (TOML)")
    parser.add_argument("--write", action="store_true", help=f"append rows to {RESULTS.name}")
    return parser.parse_args()


def measure(
    args: argparse.Namespace, tokens: int, dense_seconds: Callable[[], float]
) -> dict[str, Any]:
    """Train for so many tokens and return what came of it, and when its last step was done."""
    busy, dense, resumed = 0.0, [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, TrainDisplay(f"layer {args.layer}") as display:

        def report(event: TrainEvent) -> None:
            nonlocal busy, resumed
            display(event)
            if isinstance(event, StepReport):
                busy += time.perf_counter() - resumed
                dense.append(dense_seconds())
                resumed = time.perf_counter()

        config = TrainConfig(
            store=args.store,
            layer=args.layer,
            out=Path(folder) / "run",
            n_ov_heads=4608,
            n_qk_heads=36,
            top_k=64,
            train_tokens=tokens,
            eval_every_tokens=tokens,
            seed=args.seed,
            device="cpu",
            **tomllib.loads("\n".join(args.set)),
        )
        resumed = time.perf_counter()
        trained = train(config, report=report)
    return {
        "store": Path(args.store).name,
        "layer": args.layer,
        "seed": args.seed,
        "set": args.set,
        "train_tokens": trained.train_tokens,
        "fvu": trained.fvu,
        "reached": trained.fvu is not None and trained.fvu <= TARGET_FVU,
        "dead_fraction": trained.dead_fraction,
        "tokens_per_second": trained.tokens_per_second,
        "seconds_to_last_step": busy,
        "dense_step_seconds": statistics.mean(dense),
        "machine": machine("torch", "transformers", "lorsa"),
    }


def write_row(result: dict[str, Any]) -> None:
    row = [
        result["store"],
        result["layer"],
        result["seed"],
        ", ".join(result["set"]) or "default",
        f"{result['train_tokens']:,}",
        f"{result['fvu']:.4f}",
        f"{result['dead_fraction']:.1%}",
        f"{result['seconds_to_last_step']:.1f}",
        f"{result['tokens_per_second']:,.0f}",
        f"{result['dense_step_seconds']:.3f}",
        f"{result['dense_steps']:.0f}",
        f"{result['share_of_reference']:.2f}",
        result["machine"],
    ]
    append_row(RESULTS, row)


if __name__ == "__main__":
    main()
