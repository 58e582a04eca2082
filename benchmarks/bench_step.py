"""One training step against the same step done densely: time, memory, what each operator reaches.

    python benchmarks/bench_step.py --preset smollm2 --device cpu --json

A step is forward, mean squared error, backward and Adam. "dense" is what implementations without a
sparse kernel do, "tuned" the same with torch's flash attention (dense_baseline.py). All sides train
copies of one Lorsa on the same batch and take turns (A B C A B C ...); medians are compared. Peak
memory is what a step needs besides weights, optimizer state and batch, each side in a process of
its own. A GPU multiplies in bfloat16 (autocast), a CPU in float32. What does not fit the device's
memory is null. rooflines.py times the operators one by one.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from dense_baseline import dense_forward, tuned_forward
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.kernels.choices import BACKENDS
from lorsa.kernels.dispatch import choose_path
from lorsa.language.geometry import Rope
from measure import append_row, machine
from rooflines import Case, Preset, arithmetic, milliseconds, operators
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "bench_step.md"
LR = 1e-4


PRESETS = {
    "smollm2": Preset(576, 36, 64, 4_608, 64, 8, 256),
    "smollm2-32x": Preset(576, 144, 64, 18_432, 64, 8, 256),
    "pythia-160m": Preset(768, 48, 64, 6_144, 64, 32, 1_024),
    "llama-3.1-8b": Preset(4_096, 256, 128, 32_768, 128, 16, 1_024),
    "paper-g1": Preset(768, 6_144, 64, 6_144, 64, 8, 1_024),
}
SIDES: dict[str, Callable[[Lorsa, Tensor], Tensor]] = {
    "ours": lambda lorsa, x: lorsa(x),
    "dense": dense_forward,
    "tuned": tuned_forward,
}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.peak_of:
        print(json.dumps(peak_mb(args.peak_of, make_case(args))))
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the comparison as one JSON-able object."""
    case = make_case(args)
    times = step_times(case, args.rounds)
    peaks = {side: peak_in_child(side, args) for side in SIDES}
    n_tokens = case.x.shape[0] * case.x.shape[1]
    return {
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


def make_case(args: argparse.Namespace) -> Case:
    """Return a Lorsa at random whose z are spread like those of a trained one, and a batch."""
    p, device = PRESETS[args.preset], torch.device(args.device)
    torch.manual_seed(0)
    config = LorsaConfig(
        d_model=p.d_model,
        n_qk_heads=p.n_qk_heads,
        d_qk_head=p.d_qk_head,
        n_ov_heads=p.n_ov_heads,
        top_k=p.top_k,
        scale=p.d_qk_head**-0.5,
        rope=Rope(inv_freq=tuple(10_000 ** (-i / p.d_qk_head) for i in range(0, p.d_qk_head, 2))),
    )
    with device:
        lorsa = Lorsa(config, backend=args.backend).to(device)
        with torch.no_grad():
            for weight in (lorsa.W_Q, lorsa.W_K, lorsa.W_V, lorsa.W_O):
                weight.normal_(std=p.d_model**-0.5)
        x, y = torch.randn(2, p.batch, p.seq, p.d_model)
    return Case(p, lorsa, x, y)


def make_step(side: str, case: Case) -> Callable[[], None]:
    """Return a function that trains a copy of the case's Lorsa for one step."""
    lorsa = copy.deepcopy(case.lorsa)
    adam = torch.optim.Adam(lorsa.parameters(), lr=LR, fused=True)
    for parameter in lorsa.parameters():  # so that Adam's state is there before the first step
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad()
    forward = SIDES[side]

    def step() -> None:
        with arithmetic(case.x.device):
            y_hat = forward(lorsa, case.x)
        (y_hat.float() - case.y).square().mean().backward()
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
    command = [sys.executable, __file__, "--peak-of", side, "--preset", args.preset]
    command += ["--device", args.device, "--backend", args.backend]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
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
        before = torch.cuda.memory_allocated()
        step()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the case
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step()
    step()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return (1024 * peak - before) / 1e6


def write_row(result: dict[str, Any]) -> None:
    """Append the step and its operators to the results."""
    backward = result["operators"]["attention backward"]
    ops = ", ".join(
        f"{name} {op['ms']:.3g} ms ({op['roofline_fraction']:.0%})"
        for name, op in result["operators"].items()
    )
    row = [
        result["preset"],
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
