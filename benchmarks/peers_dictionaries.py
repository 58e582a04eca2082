"""SAEs and transcoders of others beside ours: the same activations, in the same order.

Peers train in environments of their own (they disagree about numpy and transformers):

    python -m venv E/sparsify && E/sparsify/bin/pip install eai-sparsify==1.3.3
    python -m venv E/dictionary_learning
    E/dictionary_learning/bin/pip install dictionary-learning==0.1.0
    python -m venv E/llamascopium
    E/llamascopium/bin/pip install llamascopium==2.0.0b34 'transformer-lens<3' 'pyarrow<22'

With torch of another build than the index's (2.13.0+cpu here), dictionary-learning does not import
until torchvision, which it does not use, is uninstalled.

    lorsa harvest --model smollm2 --data stdlib --tokens 393216 --n-ctx 256 --layers 6,12,20 \
        --sites mlp,resid_out --store ACTS
    python benchmarks/peers_dictionaries.py export ACTS --folder F
    python benchmarks/peers_dictionaries.py ours ACTS --folder F
    python benchmarks/peers_dictionaries.py peers --folder F --environments E
    python benchmarks/peers_dictionaries.py table --folder F

Each run writes F/results/NAME.json when it ends; what is there is not run again. `--layers`,
`--kinds` and `--only` choose runs.

SmolLM2, 8 features per dimension, k 32, 368,640 training tokens in 360 steps of 1,024. Peers train
by their own trainers, losses, starts and optimizers (peers/with_*.py says what each documents and
where), in their documented recipe, and at three other learning rates, of which the best by held-out
FVU counts. What is not as documented, because the run is short: steps are of 1,024 tokens (they
document 4,096 to 65,536, which leaves 6 to 90 steps), and warm-ups of 1,000 steps and more take 5 %
of the run.

Tokens of outlier norm (above 10 times the median at any of the sites, `norm>10x`) are left out of
training and measures for everybody: in the residual stream of layers 12 and 20 they are 0.4 % of
the tokens and 98 to 99 % of the variance. FVU is over the held-out tokens that count; a dead
feature fires on no token of the run's last quarter, with the weights of its end.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "peers"))
import shared

LAYERS = (12, 6, 20)
KINDS = tuple(shared.SITES)
MASK = "norm>10x"


class Peer(NamedTuple):
    """One way of a peer to train, and the learning rates at which it is tried."""

    name: str
    variant: str
    lrs: dict[str, tuple[float, ...]]
    """Learning rates beside the documented one, by kind"""

    @property
    def script(self) -> Path:
        """Script that trains it, in its own environment."""
        return Path(__file__).parent / "peers" / f"with_{self.name.lower()}.py"


PEERS = (
    Peer("sparsify", "", {"sae": (4e-3, 2e-3, 6e-3), "transcoder": (4e-3, 2e-3, 6e-3)}),
    Peer("sparsify", "adam", {"sae": (2e-3, 1e-3, 4e-3), "transcoder": (2e-3, 1e-3, 4e-3)}),
    Peer("dictionary_learning", "", {"sae": (2e-3, 1e-3, 4e-3)}),
    Peer("Llamascopium", "", {"sae": (1e-3, 5e-4, 2e-3), "transcoder": (1e-3, 5e-4, 2e-3)}),
)


def main() -> None:
    args = parse()
    args.run(args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    for name, run in (("export", export), ("ours", ours), ("peers", peers), ("table", table)):
        verb = verbs.add_parser(name)
        verb.set_defaults(run=run)
        if run in (export, ours):
            verb.add_argument("store", type=Path)
        verb.add_argument("--folder", type=Path, required=True, help="of the comparison")
        verb.add_argument("--layers", type=numbers, default=LAYERS)
        verb.add_argument("--kinds", type=names, default=KINDS)
        if run is peers:
            verb.add_argument("--environments", type=Path, required=True, help="folder of them")
            verb.add_argument("--only", type=names, help="names of peers")
        if run is ours:
            verb.add_argument("--set", action="append", default=[], metavar="NAME=JSON")
            verb.add_argument("--name", default="", help="of these settings, in the table")
    return parser.parse_args()


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def export(args: argparse.Namespace) -> None:
    """Write what the other environments need of a store: sites, tokens that count, the MLPs."""
    from lorsa.sites import Site
    from lorsa.store.read.reader import ActivationStore
    from lorsa.store.read.sampler import Sampler
    from lorsa.train.mask import TokenMask

    store = ActivationStore.open(args.store)
    args.folder.mkdir(parents=True, exist_ok=True)
    size, shard_seqs = shared.BATCH_SEQS, store.manifest.shard_seqs
    sampler = Sampler(store.train_seqs, shard_seqs, batch_seqs=size, seed=0)
    order = [seq for step in range(shared.N_STEPS) for seq in sampler.batch(step).tolist()]
    splits = {"train": order, "held_out": store.held_out_seqs.tolist()}
    for layer in args.layers:
        for kind in args.kinds:
            sites = sorted({Site(layer, name) for name in shared.SITES[kind]})
            for site in sites:
                values = {split: store.values(site, seqs) for split, seqs in splits.items()}
                save_file(values, args.folder / f"{site}.safetensors")
            mask = TokenMask.of(MASK, store, sites)
            counts = {split: mask(seqs) for split, seqs in splits.items()}
            save_file(counts, args.folder / f"{layer}.{kind}-counts.safetensors")
        if "transcoder" in args.kinds:
            weights = {name: w.float() for name, w in store.weights(f"{layer}.mlp").items()}
            save_file(weights, args.folder / f"{layer}.mlp-weights.safetensors")


def peers(args: argparse.Namespace) -> None:
    """Train the peers, each in its environment: the documented recipes first."""
    for layer in args.layers:
        for kind, peer, lr in runs_of(args.kinds):
            if args.only and peer.name not in args.only:
                continue
            python = args.environments / peer.name.lower() / "bin" / "python"
            command = [python, peer.script, "--folder", args.folder, "--layer", layer]
            command += ["--kind", kind] + ["--variant", peer.variant] * bool(peer.variant)
            command += [] if lr is None else ["--lr", lr]
            done = subprocess.run(list(map(str, command)), env=environment(), check=False)
            if done.returncode:
                print(f"failed: {' '.join(map(str, command))}", file=sys.stderr)


def runs_of(kinds: tuple[str, ...]) -> Iterator[tuple[str, Peer, float | None]]:
    """Yield the runs of a layer: all at their documented learning rates, then at the others."""
    able = [(kind, peer) for kind in kinds for peer in PEERS if kind in peer.lrs]
    yield from ((kind, peer, None) for kind, peer in able)
    n_lrs = max(len(peer.lrs[kind]) for kind, peer in able)
    for at in range(n_lrs):
        yield from ((kind, peer, peer.lrs[kind][at]) for kind, peer in able)


def environment() -> dict[str, str]:
    """Return this process's environment without what would lead a peer to our packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def ours(args: argparse.Namespace) -> None:
    """Train ours on the same batches, with the defaults of `lorsa train` and what --set changes."""
    for layer in args.layers:
        for kind in args.kinds:
            name = "_".join(["lorsa", kind, str(layer), *filter(None, [args.name])])
            path = args.folder / "results" / f"{name}.json"
            if not path.exists():
                train_ours(args, layer, kind, path)


def train_ours(args: argparse.Namespace, layer: int, kind: str, path: Path) -> None:
    """Train one of ours, measure it as the peers are, and write the result."""
    import lorsa
    from lorsa.train.config import TrainConfig
    from lorsa.train.train import train

    settings: dict[str, Any] = {"top_k": shared.TOP_K, "expansion": float(shared.EXPANSION)}
    settings |= {"loss_mask": MASK, "train_tokens": shared.N_STEPS * shared.BATCH_SEQS * 256}
    for setting in args.set:
        key, _, value = setting.partition("=")
        settings[key] = json.loads(value)
    out = args.folder / "runs" / f"{path.stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    config = TrainConfig(
        store=args.store, layer=layer, kind=kind, out=out, device="cpu", **settings
    )
    began = time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - began
    dictionary = lorsa.load(out)

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        acts, ids = dictionary.encode(x[None])
        fired = torch.zeros(len(x), result.n_features, dtype=torch.bool)
        fired.scatter_(1, ids[0].long(), acts[0] != 0)
        return dictionary.decode(acts, ids, x[None])[0], fired

    data = shared.Data(args.folder, layer, kind, shared.N_STEPS, shared.BATCH_SEQS)
    trained = shared.Trained(reconstruct, config.lr, "lorsa train")
    about = argparse.Namespace(
        kind=kind,
        layer=layer,
        lr=None,
        variant=args.name,
        steps=shared.N_STEPS,
        batch_seqs=shared.BATCH_SEQS,
    )
    measured = shared.measure(reconstruct, data) | {"seconds": seconds}
    versions = f"lorsa {version('lorsa')}, torch {torch.__version__}"
    shared.save(path, about, "lorsa", trained, measured, versions)


def table(args: argparse.Namespace) -> None:
    """Print every run, and ours against the best of the peers."""
    results = [json.loads(path.read_text()) for path in sorted(args.folder.glob("results/*.json"))]
    whole = [run for run in results if run["tokens"] == shared.N_STEPS * shared.BATCH_SEQS * 256]
    for kind in args.kinds:
        for layer in sorted(args.layers):
            runs = [run for run in whole if run["kind"] == kind and run["layer"] == layer]
            for run in sorted(runs, key=lambda run: (run["peer"] != "lorsa", run["fvu"])):
                print_row(run, runs)


def print_row(run: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    others = [other["fvu"] for other in runs if other["peer"] != "lorsa"]
    lead = f"{1 - run['fvu'] / min(others):+.1%}" if others else ""
    cells = [
        run["date"],
        run["kind"],
        run["layer"],
        ", ".join(filter(None, [run["peer"], run["variant"]])),
        "default" if run["peer"] == "lorsa" else f"{run['lr']:.2g}",
        "documented" if run["recipe"] and run["peer"] != "lorsa" else "",
        f"{run['fvu']:.4f}",
        lead if run["peer"] == "lorsa" else "",
        f"{run['dead']:.1%}",
        f"{run['l0']:.1f}",
        f"{run['fvu_all']:.4f}",
    ]
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
