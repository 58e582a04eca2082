"""Batches, measures and results of a comparison, for the scripts of each peer's environment.

Needs torch and safetensors, and nothing of lorsa. peers_dictionaries.py says what is compared.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

EXPANSION, TOP_K, BATCH_SEQS, N_STEPS = 8, 32, 4, 360
SITES = {"sae": ("resid_out", "resid_out"), "transcoder": ("mlp_in", "mlp_out")}
"""Sites that a kind reads and writes."""
WARMUP = 0.05
"""Share of the run that warm-ups take whose documented steps are more than the run has."""


class Split:
    """Sequences of one layer: what a kind reads, what it writes, and which tokens count."""

    def __init__(self, folder: Path, layer: int, kind: str, split: str) -> None:
        names = [f"{layer}.{site}" for site in SITES[kind]]
        files = [safe_open(folder / f"{name}.safetensors", "pt") for name in names]
        self._x, self._y = (file.get_slice(split) for file in files)
        self._counts = safe_open(folder / f"{layer}.{kind}-counts.safetensors", "pt").get_slice(
            split
        )
        self.n_seqs, self.n_ctx, self.d_model = self._x.get_shape()

    def sequences(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x and y, float32 [n, n_ctx, d_model], and which count, bool [n, n_ctx]."""
        rows = slice(first, last)
        return self._x[rows].float(), self._y[rows].float(), self._counts[rows]

    def tokens(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return x and y of the tokens that count, float32, [tokens, d_model]."""
        x, y, counts = self.sequences(first, last)
        return x[counts], y[counts]


class Data:
    """Batches of one layer for one kind, in the order of our run."""

    def __init__(self, folder: Path, layer: int, kind: str, n_steps: int, batch_seqs: int) -> None:
        self.folder, self.layer, self.kind = folder, layer, kind
        self.train = Split(folder, layer, kind, "train")
        self.held_out = Split(folder, layer, kind, "held_out")
        self.n_steps, self.batch_seqs = n_steps * BATCH_SEQS // batch_seqs, batch_seqs
        if self.n_steps * batch_seqs > self.train.n_seqs:
            raise SystemExit(f"{folder} has {self.train.n_seqs} training sequences")

    @property
    def n_features(self) -> int:
        """Features of the dictionaries."""
        return EXPANSION * int(self.train.d_model)

    def batches(self, seqs: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield x and y of the run's steps; or of the whole split, so many sequences at once."""
        size = seqs or self.batch_seqs
        n_seqs = self.train.n_seqs if seqs else self.n_steps * self.batch_seqs
        for first in range(0, n_seqs, size):
            yield self.train.tokens(first, min(first + size, n_seqs))


Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function from x [n, d_model] to y_hat [n, d_model] and which features fired, bool."""


class Trained(NamedTuple):
    """What a peer's script returns."""

    reconstruct: Reconstruct
    lr: float
    what: str
    """Optimizer, start and schedule, in words"""


@torch.no_grad()
def measure(reconstruct: Reconstruct, data: Data) -> dict[str, float]:
    """Return FVU and L0 on held-out tokens, and the share of features that are dead.

    A dead feature fires on no token of the run's last quarter, with the weights of its end.
    `fvu_all` is over all held-out tokens, those of outlier norm too.
    """
    residuals, targets, counted, fired_total, n_tokens = [], [], [], 0, 0
    for first in range(0, data.held_out.n_seqs, BATCH_SEQS):
        x, y, counts = data.held_out.sequences(first, first + BATCH_SEQS)
        y_hat, fired = reconstruct(x.flatten(0, 1))
        residuals.append((y.flatten(0, 1) - y_hat).double().square().sum(dim=-1))
        targets.append(y.flatten(0, 1).double())
        counted.append(counts.flatten())
        fired_total += int(fired[counts.flatten()].sum())
        n_tokens += int(counts.sum())
    residual, target, counts = torch.cat(residuals), torch.cat(targets), torch.cat(counted)
    return {
        "fvu": fvu(residual[counts], target[counts]),
        "fvu_all": fvu(residual, target),
        "l0": fired_total / n_tokens,
        "dead": dead_share(reconstruct, data),
    }


def fvu(residual: Tensor, target: Tensor) -> float:
    """Return the fraction of variance unexplained; residual [n] squared, target [n, d_model]."""
    return float(residual.sum() / (target - target.mean(dim=0)).square().sum())


@torch.no_grad()
def dead_share(reconstruct: Reconstruct, data: Data) -> float:
    """Return the share of features that fire on no token of the run's last quarter."""
    n_seqs = data.n_steps * data.batch_seqs
    alive = torch.zeros(data.n_features, dtype=torch.bool)
    for first in range(n_seqs - n_seqs // 4, n_seqs, BATCH_SEQS):
        x, _ = data.train.tokens(first, min(first + BATCH_SEQS, n_seqs))
        alive |= reconstruct(x)[1].any(dim=0)
    return float((~alive).double().mean())


Train = Callable[[Data, float | None, str, Path], Trained]
"""Function that trains a peer: batches, learning rate (None: the documented one), variant, and
a folder to write to."""


def run(peer: str, packages: tuple[str, ...], kinds: tuple[str, ...], train: Train) -> None:
    """Train a peer as the command line says, measure it, and write the result to a file.

    Args:
        peer: its name.
        packages: packages whose versions the result names, its own first.
        kinds: kinds of dictionaries that it trains.
        train: how it is trained.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--kind", choices=kinds, required=True)
    parser.add_argument("--lr", type=float, help="in place of the documented one")
    parser.add_argument("--variant", default="", help="what else differs from the recipe")
    parser.add_argument("--steps", type=int, default=N_STEPS, help=f"of {BATCH_SEQS} sequences")
    parser.add_argument("--batch-seqs", type=int, default=BATCH_SEQS, help="sequences in a step")
    args = parser.parse_args()
    path = result_path(args.folder, peer, args)
    if path.exists():
        return
    torch.manual_seed(0)
    data = Data(args.folder, args.layer, args.kind, args.steps, args.batch_seqs)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(data, args.lr, args.variant, Path(scratch))
        seconds = time.perf_counter() - began
        measured = measure(trained.reconstruct, data)
    versions = ", ".join(f"{name} {version(name)}" for name in (*packages, "torch"))
    save(path, args, peer, trained, measured | {"seconds": seconds}, versions)


def result_path(folder: Path, peer: str, args: argparse.Namespace) -> Path:
    """Return the file of a run's result."""
    settings = ["recipe" if args.lr is None else f"lr-{args.lr:g}", args.variant]
    settings += [f"steps-{args.steps}"] * (args.steps != N_STEPS)
    settings += [f"seqs-{args.batch_seqs}"] * (args.batch_seqs != BATCH_SEQS)
    name = "_".join([peer, args.kind, str(args.layer), *filter(None, settings)])
    return folder / "results" / f"{name}.json"


def save(
    path: Path,
    args: argparse.Namespace,
    peer: str,
    trained: Trained,
    measured: dict[str, float],
    versions: str,
) -> None:
    """Write a result, and print it."""
    result = {
        "peer": peer,
        "kind": args.kind,
        "layer": args.layer,
        "recipe": args.lr is None,
        "variant": args.variant,
        "lr": trained.lr,
        "what": trained.what,
        "tokens": args.steps * BATCH_SEQS * 256,
        "batch_seqs": args.batch_seqs,
        **measured,
        "versions": versions,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1))
    part.rename(path)
    print(json.dumps(result), flush=True)
