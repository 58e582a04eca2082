"""What a loss mask does: which tokens are unlike the others, and what leaving them out changes.

    python benchmarks/once/loss_mask.py --store STORE --layers 12,26 --train --write

First, of each layer, how large the tokens are that a mask can name and what share of the squared
output they take. With --train, also a Lorsa trained with every token and one without the masked
ones, both measured on the same two sets of held-out tokens: all, and those that the mask leaves.
"""

import argparse
import os
import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from lorsa import __version__
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.metrics import evaluate
from lorsa.display.train import TrainDisplay
from lorsa.sites import attention_ports
from lorsa.store.layers import choose_layers
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.mask import TokenMask
from lorsa.train.train import train
from torch import Tensor

RULES = ("first", "special", "norm>3x", "norm>5x", "norm>10x")
RESULTS = Path(__file__).parent.parent / "results" / "loss_mask.md"
EVAL_SEQS = 8


def main() -> None:
    args = parse()
    store = ActivationStore.open(args.store)
    layers = choose_layers(args.layers, store.layers, where=args.store)
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    text = [
        f"\n{datetime.now(UTC):%Y-%m-%d}, {Path(store.manifest.model['id']).name}, "
        f"{Path(args.store).name}, sequences of {store.manifest.n_ctx}; {machine}, "
        f"lorsa {__version__}\n"
    ]
    if not args.train:
        text += sizes(store, layers)
    else:
        text += runs(args, store, layers)
    print("\n".join(text))
    if args.write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(text) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--mask", default="special,first,norm>10x")
    parser.add_argument("--tokens", type=int, default=369_000)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--folder", type=Path, default=Path("build/loss_mask"))
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    return parser.parse_args()


def sizes(store: ActivationStore, layers: list[int]) -> list[str]:
    """Return rows: of each kind of token, how many there are and how large they are."""
    lines = [
        "| layer | tokens | share of tokens | median of x | median of y | share of y squared |",
        "|---|---|---|---|---|---|",
    ]
    for layer in layers:
        each = [store.norms(site, store.train_seqs) for site in attention_ports(layer).sites]
        norms = torch.stack(each, dim=-1).numpy()  # [n, n_ctx, 2]
        usual = np.median(norms.reshape(-1, 2), axis=0)
        largest = norms.reshape(-1, 2).max(axis=0) / usual
        lines.append(
            f"| {layer} | the largest | | {largest[0]:.1f} x | {largest[1]:.1f} x | |",
        )
        for rule in RULES:
            masked = ~TokenMask.of(rule, store, attention_ports(layer).sites)(
                store.train_seqs
            ).numpy()
            mine = norms[masked]  # [n_masked, 2]
            if not len(mine):
                lines.append(f"| {layer} | {rule} | 0 | | | |")
                continue
            x, y = np.median(mine, axis=0) / usual
            squared = np.square(mine[:, 1], dtype=np.float64).sum()
            share = squared / np.square(norms[..., 1], dtype=np.float64).sum()
            lines.append(
                f"| {layer} | {rule} | {masked.mean():.3%} | {x:.2f} x | {y:.2f} x | {share:.3%} |"
            )
    return lines


def runs(args: argparse.Namespace, store: ActivationStore, layers: list[int]) -> list[str]:
    """Return rows: Lorsas trained with and without a mask, measured on both sets of tokens."""
    lines = [
        f"{args.tokens:,} training tokens, 4,608 OV heads, 36 QK heads, top_k 64; masked: "
        f"`{args.mask}`\n",
        "| layer | seed | trained on | FVU, all tokens | FVU, not masked | dead heads "
        "| masked | their share of the error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layer in layers:
        mask = TokenMask.of(args.mask, store, attention_ports(layer).sites)
        for seed in map(int, args.seeds.split(",")):
            for rule in ("none", args.mask):
                which = "all" if rule == "none" else "not masked"
                name = f"{Path(args.store).name}-{layer}-{seed}-{which.split()[-1]}"
                config = TrainConfig(
                    store=args.store,
                    layer=layer,
                    out=args.folder / name,
                    train_tokens=args.tokens,
                    n_ov_heads=4608,
                    n_qk_heads=36,
                    top_k=64,
                    seed=seed,
                    loss_mask=rule,
                )
                with TrainDisplay(f"layer {layer}") as display:
                    result = train(config, report=display)
                lorsa = Lorsa.from_pretrained(config.out)
                found = evaluate(lorsa, held_out(store, layer, mask))
                share = error_share(lorsa, held_out(store, layer, mask))
                lines.append(
                    f"| {layer} | {seed} | {which} "
                    f"| {found.fvu_all:.4f} | {found.fvu:.4f} | {result.dead_fraction:.1%} "
                    f"| {found.masked_fraction:.2%} | {share:.2%} |"
                )
    return lines


@torch.no_grad()
def error_share(lorsa: Lorsa, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return which share of the squared error the masked tokens have."""
    masked = total = 0.0
    for x, y, counted in batches:
        error = (lorsa(x) - y).double().square().sum(dim=-1)  # [n, n_ctx]
        masked += float(error[~counted].sum())
        total += float(error.sum())
    return masked / total


def held_out(
    store: ActivationStore, layer: int, mask: TokenMask
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield x, y and which tokens count, of all held-out sequences."""
    seqs = store.held_out_seqs
    for first in range(0, len(seqs), EVAL_SEQS):
        some = seqs[first : first + EVAL_SEQS]
        x, y = store.stored(attention_ports(layer), some).on("cpu")
        yield x, y, mask(some)


if __name__ == "__main__":
    main()
