"""One training step against the same step done densely: time, memory, what each operator reaches.

    python benchmarks/bench_step.py --preset smollm2 --device cpu --json

    python benchmarks/bench_step.py --kind transcoder --preset smollm2-32x --device cpu --json

A step is forward, mean squared error, backward and Adam. "dense" is what implementations without a
sparse kernel do, "tuned" the same with what torch has to make it quicker (dense_baseline.py). All
sides train copies of one dictionary (step_cases.py) on the same batch and take turns (A B C A B C
...); medians are compared. Peak memory is what a step needs besides weights, optimizer state and
batch, gradients included, each side in a process of its own: on a CPU the highest resident memory
during two steps, less that before them, without pages of files (torch's own code) and with freed
memory given back. A GPU multiplies in bfloat16 (autocast), a CPU in float32. What does not fit the
device's memory is null. rooflines.py times the operators one by one.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lorsa.kernels.choices import BACKENDS
from lorsa.kernels.dispatch import choose_path
from measure import append_row, machine
from rooflines import WIDEST, arithmetic, milliseconds, operators
from step_cases import KINDS, PRESETS, SIDES, Case, forward_of, make_case

RESULTS = Path(__file__).parent / "results" / "bench_step.md"
LR = 1e-4
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""Environment in which glibc gives back what is freed, and not only where one piece is large."""


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.peak_of:
        print(json.dumps(peak_mb(args.peak_of, asked_case(args))))
        return
    result = measure(args)
    if args.write:
        write_row(result)
    if args.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="lorsa")
    parser.add_argument("--preset", choices=PRESETS, default="smollm2")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    parser.add_argument("--peak-of", choices=SIDES, help="only print a side's peak memory in MB")
    return parser.parse_args()


def asked_case(args: argparse.Namespace) -> Case:
    """Return the case that the options name."""
    return make_case(args.preset, kind=args.kind, device=args.device, backend=args.backend)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the comparison as one JSON-able object."""
    peaks = {side: peak_in_child(side, args) for side in SIDES}  # before this process has memory
    case = asked_case(args)
    times = step_times(case, args.rounds)
    n_tokens = case.x.shape[0] * case.x.shape[1]
    return {
        "kind": args.kind,
        "preset": args.preset,
        "device": args.device,
        "backend": choose_path(args.backend, args.device).__name__.rpartition(".")[2],
        "ours_ms": times["ours"],
        "dense_ms": times["dense"],
        "tuned_ms": times["tuned"],
        "speedup": ratio(times["dense"], times["ours"]),
        "speedup_over_tuned": ratio(times["tuned"], times["ours"]),
        "ours_peak_mb": peaks["ours"],
        "dense_peak_mb": peaks["dense"],
        "tuned_peak_mb": peaks["tuned"],
        "memory_ratio": ratio(peaks["ours"], peaks["dense"]),
        "tokens_per_second": ratio(1e3 * n_tokens, times["ours"]),
        "operators": operators(case, args.rounds),
        "rounds": args.rounds,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine("torch", device=args.device),
    }


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b, or None where one of them could not be measured."""
    return None if a is None or b is None else a / b


def make_step(side: str, case: Case) -> Callable[[], None]:
    """Return a function that trains a copy of the case's dictionary for one step."""
    dictionary = copy.deepcopy(case.dictionary)
    adam = torch.optim.Adam(dictionary.parameters(), lr=LR, fused=True)
    for parameter in dictionary.parameters():  # so that Adam's state is there before the first step
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad()
    forward = forward_of(side, case.kind)

    def step() -> None:
        with arithmetic(case.x.device):
            y_hat = forward(dictionary, case.x)
        F.mse_loss(y_hat.float(), case.y).backward()
        adam.step()
        adam.zero_grad()

    return step


def step_times(case: Case, rounds: int) -> dict[str, float | None]:
    """Return the median milliseconds of a step of each side, taking turns."""
    steps = {side: make_step(side, case) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds + 2):
        for side, step in list(steps.items()):
            try:
                ms = milliseconds(step, case.x.device)
            except torch.OutOfMemoryError:
                del steps[side]
                times[side].clear()
                continue
            if turn >= 2:
                times[side].append(ms)
    return {side: statistics.median(found) if found else None for side, found in times.items()}


def peak_in_child(side: str, args: argparse.Namespace) -> float | None:
    """Return `peak_mb` of a side, measured in a process of its own; None if it does not fit."""
    command = [sys.executable, __file__, "--peak-of", side]
    command += ["--kind", args.kind, "--preset", args.preset]
    command += ["--device", args.device, "--backend", args.backend]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVES_BACK)
    if "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_mb(side: str, case: Case) -> float:
    """Return what two steps need at their peak beyond what is there before, in MB."""
    step = make_step(side, case)
    if case.x.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held: int = torch.cuda.memory_allocated()
        step()
        step()
        return float(torch.cuda.max_memory_allocated() - held) / 1e6
    before = resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the case
    step()
    step()
    after = resident_mb()
    return after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"])


def resident_mb() -> dict[str, float]:
    """Return the resident memory of this process, its peak, and its part that files back, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) / 1e6 for name, size, _ in sizes}


def write_row(result: dict[str, Any]) -> None:
    """Append the step and its operators to the results."""
    backward = result["operators"][f"{WIDEST[result['kind']]} backward"]
    ops = ", ".join(
        f"{name} {op['ms']:.3g} ms ({op['roofline_fraction']:.0%})"
        for name, op in result["operators"].items()
    )
    row = [
        result["preset"] if result["kind"] == "lorsa" else f"{result['kind']}, {result['preset']}",
        result["backend"],
        *(spell(result[f"{side}_ms"], ".1f") for side in SIDES),
        *(spell(result[name], ".2f") for name in ("speedup", "speedup_over_tuned")),
        *(spell(result[f"{side}_peak_mb"], ",.0f") for side in SIDES),
        spell(result["memory_ratio"], ".2f"),
        ops,
        *(spell(backward[name], ".3g") for name in ("dense_ms", "tuned_ms")),
        result["machine"],
    ]
    append_row(RESULTS, row)


def spell(value: float | None, form: str) -> str:
    """Write a number for the table."""
    return "does not fit" if value is None else format(value, form)


if __name__ == "__main__":
    main()
