"""How fast a store is written and read, and what a token takes, for each dtype and compression.

    python benchmarks/bench_store.py --json
    python benchmarks/bench_store.py --from acts --layer 12 --write

Activations of a store (or drawn ones, with channels of very different sizes) are written as one
layer of new stores, and read in batches of 8 sequences, in the order on disk and shuffled, by

    lorsa     `batches`, which is what training reads with, every checksum compared
    zarr      zarr-python: a slice for each sequence (`oindex` is slower), or for 8 in order
    memmap    numpy.memmap of the same values in a plain file, copied into one buffer

The three take turns on each store, several rounds; medians are reported. The page cache is warm.
GB/s counts the bytes that are delivered: those of the store's dtype, before compression. The writer
may hold 64 MB; its peak is reported, and by how much reading 50 epochs grows the process.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from lorsa import __version__
from lorsa.sites import Site, attention_ports
from lorsa.store.care.info import format_bytes
from lorsa.store.layered import pair_facts
from lorsa.store.manifest import Manifest, held_out_shards
from lorsa.store.read.loader import batches
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.sampler import Sampler
from lorsa.store.write.writer import StoreWriter
from measure import machine, resident_mb
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "bench_store.md"
BATCH_SEQS = 8
SHARD_SEQS = 64
LAYER = 0
BUFFER_BYTES = 64 << 20
CASES = (
    ("bfloat16", "none", "store"),
    ("bfloat16", "lz4", "store"),
    ("bfloat16", "zstd", "store"),
    ("bfloat16", "none", "derive"),
    ("float16", "none", "store"),
    ("float32", "none", "store"),
    ("float32", "lz4", "store"),
    ("int8", "none", "store"),
    ("int8", "zstd", "store"),
    ("int8", "none", "derive"),
    ("int8", "zstd", "derive"),
)


class Case(NamedTuple):
    """One store with the same values in plain files."""

    dtype: str
    compression: str
    outputs: str
    store: ActivationStore
    arrays: dict[str, Any]
    """zarr-python's, by name"""
    maps: dict[str, Any]
    """numpy's, by name"""
    write_gb_s: float
    peak_buffer_bytes: int
    """The most that waited for the disk"""

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch as it is delivered."""
        return sum(BATCH_SEQS * plain[0].nbytes for plain in self.maps.values())


class InOrder:
    """Gives the sequences of a store as they lie on disk, as a `Sampler` does shuffled ones."""

    def __init__(self, n_seqs: int) -> None:
        self.n_batches = n_seqs // BATCH_SEQS

    def batch(self, step: int) -> Any:
        """Return the sequences of a step."""
        first = step % self.n_batches * BATCH_SEQS
        return np.arange(first, first + BATCH_SEQS)


def main() -> None:
    args = parse()
    x, y = stored(args) if args.source else drawn(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cases = [make_case(Path(folder), x, y, *case) for case in wanted(args)]
        rows = [row for case in cases for row in measure(case, args)]
        growth_mb = rss_growth(cases[0])
    result = {
        "rows": rows,
        "rss_growth_mb": growth_mb,
        "buffer_bytes": BUFFER_BYTES,
        "peak_buffer_bytes": max(case.peak_buffer_bytes for case in cases),
        "batch_seqs": BATCH_SEQS,
        "n_ctx": x.shape[1],
        "d_model": x.shape[2],
        "n_tokens": x.shape[0] * x.shape[1],
        "source": "drawn" if args.source is None else model_of(args.source, args.layer),
        "machine": machine("zarr", "numpy", "lorsa"),
    }
    if args.write:
        write_table(result)
    if args.json:
        print(json.dumps(result))
    else:
        print(table(rows))
        print(f"resident memory over 50 epochs: {growth_mb:+.1f} MB")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, help="store with activations to copy")
    parser.add_argument("--layer", type=int, default=12, help="of that store")
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--n-ctx", type=int, default=256, help="of drawn activations")
    parser.add_argument("--d-model", type=int, default=576, help="of drawn activations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", help="measure this one alone")
    parser.add_argument("--compression", help="measure this one alone")
    parser.add_argument("--folder", type=Path, help="where to put the stores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help=f"add the table to {RESULTS.name}")
    return parser.parse_args()


def wanted(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    return [
        case
        for case in CASES
        if args.dtype in (None, case[0]) and args.compression in (None, case[1])
    ]


def stored(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return x and y of a store's first sequences, float32."""
    store = ActivationStore.open(args.source)
    n_seqs = min(store.manifest.n_seq, args.tokens // store.manifest.n_ctx)
    x, y = store.activations(attention_ports(args.layer), range(n_seqs // BATCH_SEQS * BATCH_SEQS))
    return x.float(), y.float()


def drawn(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return random activations whose channels differ in size as those of models do."""
    generator = torch.Generator().manual_seed(0)
    n_seqs = args.tokens // args.n_ctx // BATCH_SEQS * BATCH_SEQS

    def draw() -> Tensor:
        size = torch.randn(args.d_model, generator=generator).exp()
        return torch.randn(n_seqs, args.n_ctx, args.d_model, generator=generator) * size

    return draw(), draw()


def make_case(
    folder: Path, x: Tensor, y: Tensor, dtype: str, compression: str, outputs: str
) -> Case:
    """Write a store, timed, and the same values as plain files."""
    root = folder / f"{dtype}-{compression}-{outputs}"
    n_seq, n_ctx, d_model = x.shape
    manifest = Manifest(
        uuid="bench",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        lorsa_version=__version__,
        model={"id": "none", "revision": None},
        tokenizer={},
        corpus={"data": "none", "n_documents": 1},
        request={},
        n_seq=n_seq,
        n_ctx=n_ctx,
        shard_seqs=SHARD_SEQS,
        dtype=dtype,
        compression=compression,
        sites=pair_facts(LAYER, d_model, outputs),
        modules={f"{LAYER}.attention": {"weights": []}},
        held_out_shards=held_out_shards(n_seq, SHARD_SEQS),
    )
    ids = torch.zeros(n_seq, n_ctx, dtype=torch.int32)
    with StoreWriter.create(
        root,
        manifest,
        tokens=ids,
        documents=ids,
        document_names=["none"],
        modules={f"{LAYER}.attention": {}},
        sample=pair(x, y, slice(BATCH_SEQS)),
        buffer_bytes=BUFFER_BYTES,
    ) as writer:
        started = time.perf_counter()
        for shard in writer.missing_shards():
            with writer.shard(shard) as session:
                for rows in runs(manifest.shard_rows(shard)):
                    session.append(pair(x, y, rows))
        writer.finish()
        seconds = time.perf_counter() - started
        peak = writer.peak_buffer_bytes
    group = zarr.open_group(root, mode="r")[f"layers/{LAYER}"]
    assert isinstance(group, zarr.Group)
    names = [name for name in sorted(group.array_keys()) if not name.endswith("_norm")]
    arrays: dict[str, Any] = {name: group[name] for name in names}
    maps = {name: plain_file(root / f"{name}.plain", array) for name, array in arrays.items()}
    n_bytes = sum(plain.nbytes for plain in maps.values())
    store = ActivationStore.open(root)
    return Case(dtype, compression, outputs, store, arrays, maps, n_bytes / seconds / 1e9, peak)


def pair(x: Tensor, y: Tensor, rows: slice) -> dict[Site, Tensor]:
    return dict(zip(attention_ports(LAYER).sites, (x[rows], y[rows]), strict=True))


def runs(rows: range) -> Iterator[slice]:
    for first in range(rows.start, rows.stop, BATCH_SEQS):
        yield slice(first, min(first + BATCH_SEQS, rows.stop))


def plain_file(path: Path, array: Any) -> Any:
    """Write an array's values to a plain file and map it."""
    whole = np.memmap(path, dtype=array.dtype, mode="w+", shape=array.shape)
    for rows in runs(range(array.shape[0])):
        whole[rows] = array[rows]
    whole.flush()
    return np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)


def measure(case: Case, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Let the three ways take turns; yield a row per order."""
    n_seq = case.store.manifest.n_seq
    sampler = Sampler(np.arange(n_seq), SHARD_SEQS, batch_seqs=BATCH_SEQS)
    ways: dict[str, Callable[[Case, Any, range], None]] = {
        "read_gb_s": read_lorsa,
        "zarr_gb_s": read_zarr,
        "memmap_gb_s": read_memmap,
    }
    sources: dict[str, Any] = {"sequential": InOrder(n_seq), "shuffled": sampler}
    for order, source in sources.items():
        n_batches = source.n_batches
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for trip in range(args.rounds + 1):
            steps = range(trip * n_batches, (trip + 1) * n_batches)
            for way, read in ways.items():
                started = time.perf_counter()
                read(case, source, steps)
                if trip:  # the first warms the cache
                    seconds[way].append(time.perf_counter() - started)
        rates = {
            way: n_batches * case.batch_bytes / 1e9 / statistics.median(times)
            for way, times in seconds.items()
        }
        yield {
            "dtype": case.dtype,
            "compression": case.compression,
            "outputs": case.outputs,
            "order": order,
            **rates,
            "write_gb_s": case.write_gb_s,
            "bytes_per_token": activation_bytes(case.store) / n_seq / case.store.manifest.n_ctx,
        }


def activation_bytes(store: ActivationStore) -> int:
    return sum(
        e.n_bytes for e in store.entries if "/attn" in e.array and not e.array.endswith("_norm")
    )


def read_lorsa(case: Case, source: Any, steps: range) -> None:
    for _ in batches(
        case.store, attention_ports(LAYER), source, first_step=steps.start, n_steps=steps.stop
    ):
        pass


def read_zarr(case: Case, source: Any, steps: range) -> None:
    for step in steps:
        seqs = source.batch(step)
        in_order = bool((np.diff(seqs) == 1).all())
        for array in case.arrays.values():
            if in_order:
                array[int(seqs[0]) : int(seqs[-1]) + 1]
            else:
                for seq in seqs:
                    array[int(seq)]


def read_memmap(case: Case, source: Any, steps: range) -> None:
    buffers = {
        name: np.empty((BATCH_SEQS, *plain.shape[1:]), plain.dtype)
        for name, plain in case.maps.items()
    }
    for step in steps:
        seqs = source.batch(step)
        for name, plain in case.maps.items():
            for i, seq in enumerate(seqs):
                buffers[name][i] = plain[seq]


def rss_growth(case: Case, epochs: int = 50) -> float:
    """Return by how many MB resident memory grows from the 2nd to the last epoch of a run."""
    n_seq = case.store.manifest.n_seq
    sampler = Sampler(np.arange(n_seq), SHARD_SEQS, batch_seqs=BATCH_SEQS)
    n_steps = epochs * sampler.n_batches
    early = late = 0.0
    for step, _ in enumerate(
        batches(case.store, attention_ports(LAYER), sampler, first_step=0, n_steps=n_steps)
    ):
        if step == 2 * sampler.n_batches:
            early = resident_mb()
        late = resident_mb() if step == n_steps - 1 else late
    return late - early


def model_of(source: Path, layer: int) -> str:
    model = str(ActivationStore.open(source).manifest.model["id"]).rpartition("/")[2]
    return f"{model} layer {layer}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| dtype | compression | outputs | order | lorsa GB/s | zarr GB/s | memmap GB/s "
        "| times zarr | of memmap | write GB/s | bytes per token |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs, plain = row["read_gb_s"], row["zarr_gb_s"], row["memmap_gb_s"]
        cells = [
            *(row[name] for name in ("dtype", "compression", "outputs", "order")),
            *(f"{rate:.2f}" for rate in (ours, theirs, plain)),
            f"{ours / theirs:.1f}",
            f"{ours / plain:.0%}",
            f"{row['write_gb_s']:.2f}",
            f"{row['bytes_per_token']:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(result: dict[str, Any]) -> None:
    heading = (
        f"\n{datetime.now(UTC):%Y-%m-%d}, {result['source']} activations, "
        f"{result['n_tokens']:,} tokens in sequences of {result['n_ctx']}, "
        f"d_model {result['d_model']}; {result['machine']}. Resident memory over 50 epochs: "
        f"{result['rss_growth_mb']:+.1f} MB; the writer held at most "
        f"{format_bytes(result['peak_buffer_bytes'])} of {format_bytes(BUFFER_BYTES)}.\n"
    )
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(f"{heading}\n{table(result['rows'])}\n")


if __name__ == "__main__":
    main()
