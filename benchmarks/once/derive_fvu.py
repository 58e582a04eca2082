"""What a store that derives costs the dictionaries trained from it: FVU on direct data, and time.

    python benchmarks/once/derive_fvu.py --folder F --write

Three stores of the same tokens are harvested: every site itself in bfloat16 (direct), and one array
a layer, in bfloat16 and in int8, from which the sites are recomputed (`--outputs derive`). A
dictionary of each kind is trained from each, with the same seed, and all are measured on the
held-out tokens of the direct store. "seed 1" is of the direct store with another seed: what chance
does. Runs that are there already are not made again.
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.store.folder import is_complete
from lorsa.train.config import TrainConfig
from lorsa.train.train import train

sys.path.append(str(Path(__file__).parent.parent))
from measure import RESULTS, machine

TABLE = RESULTS / "derive_fvu.md"
KINDS = ("lorsa", "sae", "transcoder")
STORES = {
    "direct": ["--dtype", "bfloat16"],
    "derive-bfloat16": ["--dtype", "bfloat16", "--outputs", "derive"],
    "derive-int8": ["--dtype", "int8", "--outputs", "derive"],
}
RUNS = {"direct": ("direct", 0), "direct, seed 1": ("direct", 1)} | {
    name.replace("-", ", "): (name, 0) for name in list(STORES)[1:]
}
"""Store and seed by what a run is called."""
SITES = "attn,mlp,resid_out"


def main() -> None:
    args = parse()
    for name, options in STORES.items():
        if not is_complete(args.folder / name):
            harvest(args, args.folder / name, options)
    rows = [
        row(args, layer, kind)
        for layer in map(int, args.layers.split(","))
        for kind in args.kinds.split(",")
    ]
    text = "\n".join(["", *head(args), *(line for lines in rows for line in lines)]) + "\n"
    print(text)
    if args.write:
        with TABLE.open("a", encoding="utf-8") as file:
            file.write(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the stores and the runs")
    parser.add_argument("--layers", default="6,12,20")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--model", default="smollm2-demo")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--tokens", type=int, default=196_608)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--write", action="store_true", help=f"add the table to {TABLE.name}")
    return parser.parse_args()


def harvest(args: argparse.Namespace, store: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "lorsa", "harvest", "--model", args.model, "--data", args.data]
    command += ["--layers", args.layers, "--tokens", str(args.tokens), "--n-ctx", "256"]
    command += ["--sites", SITES, "--store", str(store), *options]
    subprocess.run(command, check=True)


def measure(args: argparse.Namespace, layer: int, kind: str, name: str) -> dict[str, Any]:
    """Train one dictionary and measure it on direct data, once."""
    store, seed = RUNS[name]
    out = args.folder / "runs" / f"{layer}-{kind}-{store}-{seed}"
    kept = out / "measured.json"
    if not kept.exists():
        config = TrainConfig(
            store=args.folder / store, layer=layer, kind=kind, out=out, seed=seed, data_seed=0,
            top_k=args.top_k, device="cpu",
        )  # fmt: skip
        trained = train(config)
        found = evaluate_run(EvalConfig(run=out, store=args.folder / "direct"))
        figures = {
            "fvu": found.quality.fvu_usual if kind == "sae" else found.fvu,
            "own_fvu": trained.fvu,
            "dead": trained.dead_fraction,
            "tokens": trained.train_tokens,
            "tokens_per_second": trained.tokens_per_second,
        }
        kept.write_text(json.dumps(figures))
        print(layer, kind, name, figures, flush=True)
    return dict(json.loads(kept.read_text()))


def row(args: argparse.Namespace, layer: int, kind: str) -> list[str]:
    """Return the table's lines of a layer and kind."""
    lines = []
    direct = measure(args, layer, kind, "direct")
    for name in RUNS:
        found = measure(args, layer, kind, name)
        away = "" if name == "direct" else f"{found['fvu'] / direct['fvu'] - 1:+.2%}"
        slower = direct["tokens_per_second"] / found["tokens_per_second"]
        cells = [layer, kind, name, f"{found['fvu']:.4f}", away, f"{found['dead']:.2%}"]
        cells += [f"{found['tokens_per_second']:,.0f}", f"{slower:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def head(args: argparse.Namespace) -> list[str]:
    return [
        f"{datetime.now(UTC):%Y-%m-%d}, {args.model}, {args.data}, {args.tokens:,} tokens in "
        f"sequences of 256, 8 features per dimension, top_k {args.top_k}; "
        f"{machine('torch', 'lorsa')}",
        "",
        "| layer | kind | trained from | FVU on direct data | against direct | dead | tokens/s | "
        "time of a step |",
        "|---|---|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
