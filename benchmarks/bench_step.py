"""One training step against the same step done densely: time, memory, what each operator reaches.

    python benchmarks/bench_step.py --preset smollm2 --device cpu --json

A step is forward, mean squared error, backward and Adam. Both sides train copies of one Lorsa on
the same batch and take turns (A B A B ...); medians are compared. Peak memory is what a step needs
besides weights, optimizer state and batch, each side in a process of its own. Operators are timed
one by one and compared with a roofline: the larger of operations / (matmul rate) and bytes / (copy
rate), both rates measured in the same run. A GPU multiplies in bfloat16 (autocast), a CPU in
float32.
"""

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dense_baseline import dense_forward
from lorsa.kernels import BACKENDS, choose_path, sparse_decode, sparse_topk_attention
from lorsa.model import Lorsa, LorsaConfig, Rope
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "bench_step.md"
LR = 1e-4


class Preset(NamedTuple):
    """Sizes of a Lorsa and its batch."""

    d_model: int
    n_qk_heads: int
    d_qk_head: int
    n_ov_heads: int
    top_k: int
    batch: int
    seq: int


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
}


class Case(NamedTuple):
    """A Lorsa with a batch to train on."""

    preset: Preset
    lorsa: Lorsa
    x: Tensor
    y: Tensor


def main() -> None:
    args = parse()
    if args.peak_of:
        print(json.dumps(peak_mb(args.peak_of, make_case(args))))
        return
    torch.set_num_threads(args.threads or torch.get_num_threads())
    result = measure(args)
    if args.write:
        append_rows(result)
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
    return {
        "preset": args.preset,
        "device": args.device,
        "backend": choose_path(args.backend, args.device).__name__.rpartition(".")[2],
        "ours_ms": times["ours"],
        "dense_ms": times["dense"],
        "speedup": times["dense"] / times["ours"],
        "ours_peak_mb": peaks["ours"],
        "dense_peak_mb": peaks["dense"],
        "memory_ratio": peaks["ours"] / peaks["dense"],
        "tokens_per_second": 1e3 * case.x.shape[0] * case.x.shape[1] / times["ours"],
        "operators": operators(case, args.rounds),
        "rounds": args.rounds,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(args.device),
    }


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


def arithmetic(device: torch.device) -> AbstractContextManager[Any]:
    """Return the precision of a training step: bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def step_times(case: Case, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a step of each side, taking turns."""
    steps = {side: make_step(side, case) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds + 2):
        for side, step in steps.items():
            ms = milliseconds(step, case.x.device)
            if turn >= 2:
                times[side].append(ms)
    return {side: statistics.median(found) for side, found in times.items()}


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def peak_in_child(side: str, args: argparse.Namespace) -> float:
    """Return `peak_mb` of a side, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", side, "--preset", args.preset]
    command += ["--device", args.device, "--backend", args.backend]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
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


class Cost(NamedTuple):
    """What an operator has to do at the least."""

    operations: float
    """Multiplications and additions of matrix products"""
    n_bytes: float
    """Read and written"""


def operators(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Return for every operator its median milliseconds and the share of its roofline."""
    device = case.x.device
    matmul_rate, copy_rate = ceilings(device)
    found = {}
    for name, (work, cost) in pieces(case).items():
        ms = statistics.median([milliseconds(work, device) for _ in range(rounds + 2)][2:])
        least = max(cost.operations / matmul_rate, cost.n_bytes / copy_rate)
        found[name] = {"ms": ms, "roofline_fraction": 1e3 * least / ms}
    return found


def ceilings(device: torch.device) -> tuple[float, float]:
    """Return the device's matmul operations and copied bytes (read and written) per second."""
    side = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), device=device)
    target = torch.empty_like(source)
    multiply = min(milliseconds(lambda: a @ a, device) for _ in range(8))
    move = min(milliseconds(lambda: target.copy_(source), device) for _ in range(8))
    return 2e3 * side**3 / multiply, 2e3 * 4 * source.numel() / move


def pieces(case: Case) -> dict[str, tuple[Callable[[], Any], Cost]]:
    """Return the operators of a step, each as a call with its least cost."""
    p, lorsa, x = case.preset, case.lorsa, case.x
    cuda = x.device.type == "cuda"
    dtype, size = (torch.bfloat16, 2) if cuda else (torch.float32, 4)
    tokens, group = p.batch * p.seq, p.n_ov_heads // p.n_qk_heads
    wide = 2 * p.n_qk_heads * p.d_qk_head + p.n_ov_heads  # q, k and v of a token
    pairs = p.batch * p.n_qk_heads * p.seq * (p.seq + 1) / 2  # of positions that see each other
    path = choose_path(lorsa.backend, x.device.type)
    with torch.no_grad(), arithmetic(x.device):
        q, k = (t.to(dtype) for t in lorsa.queries_keys(x))
        v = lorsa.values(x).to(dtype)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    W_O = lorsa.W_O.detach().to(dtype).requires_grad_()
    norm = lorsa.W_O.detach().norm(dim=1)

    def attend() -> tuple[Tensor, Tensor]:
        return sparse_topk_attention(
            q, k, v, norm, top_k=p.top_k, scale=lorsa.config.scale, backend=lorsa.backend
        )

    acts, ids = attend()
    kept = acts.detach().requires_grad_()
    y_hat = sparse_decode(kept, ids, W_O, backend=lorsa.backend)
    d_acts, dy = torch.randn_like(acts), torch.randn_like(y_hat)
    scratch = torch.randn(min(tokens, p.seq), p.n_ov_heads, device=x.device)
    firing = firing_share(ids, acts, group, p.n_qk_heads)

    def project() -> Tensor:
        with arithmetic(x.device):
            return sum(t.float().sum() for t in (*lorsa.queries_keys(x), lorsa.values(x)))  # type: ignore[return-value]

    def backward(output: Tensor, inputs: list[Tensor], grad: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)

    gathered = tokens * p.top_k * p.d_model * size
    matmul = 2 * tokens * p.d_model * wide
    qkv_bytes, kept_bytes = tokens * wide * size, tokens * p.top_k * (size + 4)
    return {
        "projections": (
            project,
            Cost(matmul, qkv_bytes + wide * p.d_model * 4),
        ),
        "attention": (
            attend,
            Cost(2 * pairs * (p.d_qk_head + group), qkv_bytes + kept_bytes),
        ),
        "select": (
            lambda: path.select_top_k(scratch, norm, top_k=p.top_k, select="relu"),
            Cost(0, scratch.numel() * 4 + len(scratch) * p.top_k * 8),
        ),
        "attention backward": (
            backward(acts, [q, k, v], d_acts),
            Cost(2 * firing * pairs * (3 * p.d_qk_head + 2 * group), 2 * qkv_bytes + kept_bytes),
        ),
        "decode": (
            lambda: sparse_decode(kept, ids, W_O, backend=lorsa.backend),
            Cost(0, gathered + tokens * p.d_model * size),
        ),
        "decode backward": (
            backward(y_hat, [kept, W_O], dy),
            Cost(0, 2 * gathered + p.n_ov_heads * p.d_model * size),
        ),
    }


def firing_share(ids: Tensor, acts: Tensor, group: int, n_qk_heads: int) -> float:
    """Return the share of (token, QK head) pairs at which a head fired."""
    fired = torch.zeros(*ids.shape[:2], n_qk_heads, device=ids.device)
    fired.scatter_reduce_(-1, ids.long() // group, (acts > 0).float(), "amax")
    return float(fired.mean())


def machine(device: str) -> str:
    what = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    python = f"Python {platform.python_version()}"
    return f"{what}, {platform.machine()}, {python}, torch {torch.__version__}"


def append_rows(result: dict[str, Any]) -> None:
    """Append the step and its operators to the results."""
    ops = ", ".join(
        f"{name} {op['ms']:.3g} ms ({op['roofline_fraction']:.0%})"
        for name, op in result["operators"].items()
    )
    row = [
        result["date"],
        result["preset"],
        result["backend"],
        f"{result['ours_ms']:.1f}",
        f"{result['dense_ms']:.1f}",
        f"{result['speedup']:.2f}",
        f"{result['ours_peak_mb']:,.0f}",
        f"{result['dense_peak_mb']:,.0f}",
        f"{result['memory_ratio']:.2f}",
        ops,
        result["machine"],
    ]
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("| " + " | ".join(row) + " |\n")


if __name__ == "__main__":
    main()
