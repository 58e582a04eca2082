"""What a store's encoding costs a Lorsa: bytes per token, read rate, and FVU on unquantised data.

    lorsa harvest --model smollm2-135m --layers 12 --dtype float32 --n-ctx 256 --tokens 147456 ...
    python benchmarks/quality_encodings.py --from acts --layer 12 --seeds 0,1 --write

A layer of a float32 store is written again in each encoding, sequence for sequence, and a Lorsa is
trained from each with the same seed. All are measured on the held-out tokens of the float32 store.
"no channels" is int8 with a scale per token alone. A run that is there already is not made
again, so the script can be stopped and started, and --only runs some.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lorsa.display.train import TrainDisplay
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.sites import Site, attention_ports
from lorsa.store.folder import is_complete
from lorsa.store.layered import pair_facts
from lorsa.store.read.loader import batches
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.sampler import Sampler
from lorsa.store.write.writer import StoreWriter
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from measure import machine

RESULTS = Path(__file__).parent / "results" / "quality_encodings.md"
BATCH_SEQS = 8
SAMPLE_SEQS = 8
"""Sequences that int8's channel scales are taken from, as many as a harvest takes by default."""


class Encoding(NamedTuple):
    """One way to keep activations."""

    dtype: str
    outputs: str
    compression: str = "none"
    channels: bool = True
    """Whether int8 has scales of its channels"""


ENCODINGS = {
    "float32": Encoding("float32", "store"),
    "bfloat16": Encoding("bfloat16", "store"),
    "bfloat16, derive": Encoding("bfloat16", "derive"),
    "float16, derive": Encoding("float16", "derive"),
    "int8": Encoding("int8", "store"),
    "int8, derive": Encoding("int8", "derive"),
    "int8, derive, zstd": Encoding("int8", "derive", "zstd"),
    "int8, derive, no channels": Encoding("int8", "derive", channels=False),
}
SAME_AS = {"int8, derive, zstd": "int8, derive"}
"""Lossless compression trains the same Lorsa: its store is measured, not its FVU once more."""
BASELINE = "bfloat16"


def main() -> None:
    args = parse()
    rows = [measure(name, args) for name in args.only]
    if BASELINE in args.only:
        compare(rows)
    if args.write:
        write_table(rows, args)
    print(
        json.dumps({"rows": rows, "machine": machine("torch", "lorsa")})
        if args.json
        else table(rows)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, required=True, help="float32 store")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--train-tokens", type=int, default=98_304)
    parser.add_argument("--folder", type=Path, default=Path("build/quality_encodings"))
    parser.add_argument("--only", nargs="*", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help=f"add the table to {RESULTS.name}")
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the table."""
    source = ActivationStore.open(args.source)
    root = args.folder / f"{args.layer}-{name.replace(', ', '-').replace(' ', '-')}"
    if not is_complete(root):
        write(source, root, ENCODINGS[name], args.layer)
    store = ActivationStore.open(root)
    n_bytes = sum(
        e.n_bytes for e in store.entries if "/attn" in e.array and not e.array.endswith("_norm")
    )
    n_tokens = store.manifest.n_seq * store.manifest.n_ctx
    trained = args.folder / f"{args.layer}-{SAME_AS.get(name, name)}".replace(", ", "-").replace(
        " ", "-"
    )
    return {
        "encoding": name,
        "layer": args.layer,
        "bytes_per_token": n_bytes / n_tokens,
        "read_gb_s": read_rate(store, args.layer),
        "fvu": [fvu(trained, args, int(seed)) for seed in args.seeds.split(",")],
    }


def write(source: ActivationStore, root: Path, encoding: Encoding, layer: int) -> None:
    """Write a layer of a store again."""
    module, ports = f"{layer}.attention", attention_ports(layer)
    manifest = replace(
        source.manifest,
        uuid=root.name,
        dtype=encoding.dtype,
        compression=encoding.compression,
        sites=pair_facts(layer, source.width(Site(layer, "attn_in")), encoding.outputs),
        modules={module: source.manifest.modules[module]},
        checksums={},
    )
    everything = range(manifest.n_seq)
    x, y = source.activations(ports, range(SAMPLE_SEQS))
    sample = (x, y) if encoding.channels else (torch.ones_like(x), torch.ones_like(y))
    with StoreWriter.create(
        root,
        manifest,
        tokens=source.tokens(everything),
        documents=source.documents(everything),
        document_names=source.document_names(),
        modules={module: source.weights(module)},
        sample=dict(zip(ports.sites, sample, strict=True)),
    ) as writer:
        for shard in writer.missing_shards():
            with writer.shard(shard) as session:
                for seq in manifest.shard_rows(shard):
                    pair = source.activations(ports, [seq])
                    session.append(dict(zip(ports.sites, pair, strict=True)))
        writer.finish()


def read_rate(store: ActivationStore, layer: int, passes: int = 5) -> float:
    """Return GB/s of shuffled batches, before compression, from a warm cache; the median pass."""
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=BATCH_SEQS)
    rates = []
    for trip in range(passes + 1):
        n_bytes, started, n = 0, time.perf_counter(), sampler.n_batches
        for batch in batches(
            store, attention_ports(layer), sampler, first_step=trip * n, n_steps=(trip + 1) * n
        ):
            n_bytes += sum(tensor.nbytes for tensor in batch.stored.tensors())
        rates.append(n_bytes / 1e9 / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def fvu(root: Path, args: argparse.Namespace, seed: int) -> float:
    """Return the FVU, on the float32 store, of a Lorsa trained from a store."""
    out = root.with_name(f"{root.name}-run-{seed}")
    with TrainDisplay(f"layer {args.layer}") as display:
        train(
            TrainConfig(
                store=root,
                layer=args.layer,
                out=out,
                train_tokens=args.train_tokens,
                n_ov_heads=4608,
                n_qk_heads=36,
                top_k=64,
                seed=seed,
            ),
            report=display,
        )
    return evaluate_run(EvalConfig(run=out, store=args.source)).fvu


def compare(rows: list[dict[str, Any]]) -> None:
    """Add how much larger each FVU is than bfloat16's of the same seed, the mean over seeds."""
    base = next(row for row in rows if row["encoding"] == BASELINE)
    for row in rows:
        ratios = [mine / theirs for mine, theirs in zip(row["fvu"], base["fvu"], strict=True)]
        row["fvu_change"] = statistics.mean(ratios) - 1
        row["bytes_share"] = row["bytes_per_token"] / base["bytes_per_token"]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| encoding | bytes per token | of bfloat16 | read GB/s | FVU by seed | change of FVU |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["encoding"],
            f"{row['bytes_per_token']:,.0f}",
            f"{row['bytes_share']:.1%}" if "bytes_share" in row else "-",
            f"{row['read_gb_s']:.2f}",
            ", ".join(f"{value:.4f}" for value in row["fvu"]),
            f"{row['fvu_change']:+.2%}" if "fvu_change" in row else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    store = ActivationStore.open(args.source)
    heading = (
        f"\n{datetime.now(UTC):%Y-%m-%d}, {store.manifest.model['id'].rpartition('/')[2]}, layer "
        f"{args.layer}, {args.train_tokens:,} training tokens, "
        f"{len(store.held_out_seqs) * store.manifest.n_ctx:,} held out, seeds {args.seeds}; "
        f"{machine('torch', 'lorsa')}\n"
    )
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(f"{heading}\n{table(rows)}\n")


if __name__ == "__main__":
    main()
