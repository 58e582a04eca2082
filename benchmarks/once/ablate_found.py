"""What heads that `lorsa find` names do in the language model: loss where they are ablated.

    python benchmarks/once/ablate_found.py RUN --store STORE --model MODEL --kind induction --write

The n best of a type, then all that are called so, are ablated at once, the layer's error kept; each
time also as many heads of other types that fire as often, drawn at random. Measured on random
tokens that are repeated once (analyze/attention/probes.py), in each half, and on held-out
sequences, on all tokens and on those where a head of the group fires. RUN is analysed.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lorsa.analyze.attention.probes import probe_tokens
from lorsa.analyze.find import find_heads
from lorsa.analyze.result import Analysis
from lorsa.circuits.intervene import activations_of, intervene
from lorsa.dictionaries.code import Code
from lorsa.evaluate.in_model import logits_of
from lorsa.evaluate.opened import LanguageModel, Opened, load_store_model, open_run
from lorsa.language.capture import Capture
from lorsa.store.read.reader import ActivationStore
from torch import Tensor
from torch.nn.functional import cross_entropy

RESULTS = Path(__file__).parent.parent / "results" / "ablate_found.md"
NEAREST = 20
"""Of the heads that fire as often as one of the group, how many to draw from."""
BATCH_SEQS = 8
N_REPEATED = 12
"""Sequences of repeated tokens."""


class Seen(NamedTuple):
    """A text as the unchanged model reads it."""

    loss: Tensor
    """Of each next token, nats, [n, seq - 1]"""
    encoding: Code
    """What fires, [n, seq, slots]"""


def main() -> None:
    args = parse()
    store = ActivationStore.open(args.store)
    analysis = Analysis.open(args.analysis or args.run)
    opened = open_run(args.run, store, "cpu", needs_lorsa=True)
    language = load_store_model(store, args.model, [opened.layer], "cpu", print)
    texts = {"repeated": repeated(store), "held out": held_out(store, args.tokens)}
    seen = {name: look(opened, language, ids) for name, ids in texts.items()}
    for group, heads in groups(analysis, args.kind, args.store, args.n).items():
        row = {"layer": opened.layer, "kind": args.kind, "group": group}
        for name in texts:
            row |= measure(opened, language, heads, texts[name], seen[name])
        print(json.dumps(row | {"heads": heads[:10]}), flush=True)
        if args.write:
            append_row(row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--analysis", type=Path, help="default: the run's own")
    parser.add_argument("--store", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kind", default="induction")
    parser.add_argument("--n", type=int, default=10, help="heads of the best group")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens")
    parser.add_argument("--write", action="store_true", help=f"append rows to {RESULTS.name}")
    return parser.parse_args()


def repeated(store: ActivationStore) -> Tensor:
    """Return probes as `lorsa analyze` makes them, [n, seq]."""
    facts = store.manifest
    some = store.tokens(np.arange(min(256, facts.n_seq))).numpy()
    usable = np.setdiff1d(some, facts.tokenizer.get("special_token_ids") or [])
    return probe_tokens(usable.astype(np.int64), n_ctx=facts.n_ctx, bos=None)[:N_REPEATED]


def held_out(store: ActivationStore, n_tokens: int) -> Tensor:
    """Return sequences that no run was trained on, [n, seq]."""
    n_seqs = max(1, n_tokens // store.manifest.n_ctx)
    return store.tokens(store.held_out_seqs[:n_seqs]).long()


def groups(analysis: Analysis, kind: str, store: str, n: int) -> dict[str, list[int]]:
    """Return the groups of heads to ablate, by name."""
    best = [found.head for found in find_heads(kind, store=store, runs=[analysis.root], n=n)]
    table = analysis.heads.to_pandas()
    called = table[table["type"] == kind].sort_values("frequency")["head"].tolist()
    return {
        f"{len(best)} best": best,
        f"{len(best)} others": others(table, kind, best),
        f"all {len(called):,} of the type": called,
        f"{len(called):,} others": others(table, kind, called),
    }


def others(table: Any, kind: str, heads: Sequence[int]) -> list[int]:
    """Return as many heads of other types, each among the nearest to one of these in frequency."""
    rest = table[~table["type"].isin([kind, "silent"])].drop(index=list(heads), errors="ignore")
    rng, drawn = np.random.default_rng(0), list[int]()
    for head in heads:
        gap = np.log(rest["frequency"] / table.loc[head, "frequency"]).abs()
        drawn.append(int(rng.choice(gap.nsmallest(NEAREST).index)))
        rest = rest.drop(index=drawn[-1])
    return drawn


@torch.no_grad()
def look(opened: Opened, language: LanguageModel, ids: Tensor) -> Seen:
    """Run the model as it is."""
    losses, acts, fired = [], [], []
    for batch in ids.split(BATCH_SEQS):
        with Capture(language.model, [language.sites[opened.layer]]) as capture:
            x = capture.calls(batch)[opened.layer].x
        encoding = opened.lorsa.encode(x.float())
        losses.append(loss_of(language, batch))
        acts.append(encoding.acts)
        fired.append(encoding.ids)
    return Seen(torch.cat(losses), Code(torch.cat(acts), torch.cat(fired)))


def loss_of(language: LanguageModel, ids: Tensor) -> Tensor:
    """Return the loss of each next token, nats, [n, seq - 1]."""
    logits = logits_of(language.model, ids)[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()


@torch.no_grad()
def measure(
    opened: Opened, language: LanguageModel, heads: list[int], ids: Tensor, seen: Seen
) -> dict[str, float]:
    """Return how the loss changes on a text, nats per token, when heads are ablated."""
    changes = dict.fromkeys(heads, 0.0)
    with intervene(language.model, opened.lorsa, opened.layer, changes):
        after = torch.cat([loss_of(language, batch) for batch in ids.split(BATCH_SEQS)])
    change, half = after - seen.loss, ids.shape[1] // 2
    if is_repeated(ids):
        return {
            "first half": change[:, : half - 1].mean().item(),
            "second half": change[:, half:].mean().item(),
            "second half before": seen.loss[:, half:].mean().item(),
        }
    z = activations_of(seen.encoding, torch.tensor(heads), opened.lorsa.config.n_ov_heads)
    fired = (z[:, :-1] != 0).any(dim=-1)
    return {
        "held out": change.mean().item(),
        "held out se": (change.mean(dim=1).std() / len(change) ** 0.5).item(),
        "fires": fired.double().mean().item(),
        "where it fires": change[fired].mean().item(),
    }


def is_repeated(ids: Tensor) -> bool:
    """Say whether the second half of sequences is their first."""
    return bool((ids[:, : ids.shape[1] // 2] == ids[:, ids.shape[1] // 2 :]).all())


def append_row(row: dict[str, Any]) -> None:
    cells = [
        f"{datetime.now(UTC):%Y-%m-%d}",
        f"{row['layer']}",
        f"{row['kind']}, {row['group']}",
        f"{row['fires']:.1%}",
        f"{row['first half']:+.3f}",
        f"{row['second half']:+.3f} of {row['second half before']:.2f}",
        f"{row['held out']:+.4f} ± {row['held out se']:.4f}",
        f"{row['where it fires']:+.4f}",
    ]
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("| " + " | ".join(cells) + " |\n")


if __name__ == "__main__":
    main()
