"""What the bookkeeping of a large store takes: begin it, claim and commit every shard, open it.

    python benchmarks/bench_bookkeeping.py --before REV --json

The loop of a harvest runs as it does otherwise, over a store of 120 layers with two arrays each,
which is as many arrays as 80 layers with three; but in the place of the model and of the bytes of
activations, a shard's entries in the journal are made up. Its files are holes of the right size,
and all layers are links to one folder. So what is left is the bookkeeping: token ids, metadata,
claims, journal, shards.parquet, and a look at every file.

With --before, the same is done by the code of an earlier revision, as far as it comes in a time.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RESULTS = Path(__file__).parent / "results" / "bench_bookkeeping.md"
ROOT = Path(__file__).resolve().parents[1]
SITES = ("attn_in", "attn_out")
DTYPE_BYTES = 2


class TimeIsUpError(Exception):
    """Enough shards were written."""


def main() -> None:
    args = parse()
    if args.measure:
        print(json.dumps(measure(args, Path(args.measure))))
        return
    args.shard_seqs = args.shard_seqs or default_shard_seqs(args)
    result = run(args, ROOT.parent)
    if args.before:
        result["before"] = {"revision": args.before} | run_before(args)
    result["machine"] = (
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"
    )
    if args.write:
        append_rows(result, args)
    print(json.dumps(result, indent=1) if args.json else table(result, args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--n-ctx", type=int, default=1024)
    parser.add_argument("--d-model", type=int, default=8192)
    parser.add_argument("--shard-seqs", type=int, help="sequences in a shard; as a harvest does it")
    parser.add_argument("--folder", help="where the store is made; a temporary folder")
    parser.add_argument("--before", metavar="REV", help="do the same with the code of a revision")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for the shards")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"append rows to {RESULTS.name}")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def default_shard_seqs(args: argparse.Namespace) -> int:
    """Return what a harvest of this size would choose."""
    from lorsa.harvest.plan import shard_seqs

    seq_bytes = args.n_ctx * args.d_model * DTYPE_BYTES
    n_arrays = args.layers * len(SITES)
    return shard_seqs(args.tokens // args.n_ctx, seq_bytes=seq_bytes, n_arrays=n_arrays)


def run(args: argparse.Namespace, parent: Path) -> dict[str, Any]:
    """Measure in a process of its own, with the package in a folder."""
    sizes = ("layers", "tokens", "n_ctx", "d_model", "shard_seqs", "limit")
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in sizes]
    folder = tempfile.mkdtemp(prefix="bookkeeping-", dir=args.folder)
    try:
        done = subprocess.run(
            [sys.executable, __file__, *options, f"--measure={folder}"],
            env=os.environ | {"PYTHONPATH": str(parent)},
            cwd=folder,
            stdout=subprocess.PIPE,
            check=True,
        )
    finally:
        shutil.rmtree(folder)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_before(args: argparse.Namespace) -> dict[str, Any]:
    """Measure with the code of another revision, which is checked out into a folder for a while."""
    with tempfile.TemporaryDirectory() as parent:
        git = ["git", "-C", str(ROOT), "worktree"]
        tree = f"{parent}/lorsa"
        subprocess.run([*git, "add", "--quiet", "--detach", tree, args.before], check=True)
        try:
            return run(args, Path(parent))
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Begin a store, write its shards as far as there is time, and open it."""
    from lorsa import ActivationStore

    root = folder / "acts"
    started = time.perf_counter()
    writer = begin(args, root)
    begun = time.perf_counter()
    loop = Loop(writer, limit=args.limit)
    done = loop.run()
    result = {
        "n_shards": writer.manifest.n_shards,
        "n_arrays": args.layers * len(SITES),
        "n_files": writer.manifest.n_shards * (args.layers * (len(SITES) + 1) + 2),
        "shard_seqs": args.shard_seqs,
        "seconds": None,
        "seconds_begin": begun - started,
        **loop.facts(),
        "journal_mb": sum(f.stat().st_size for f in (root / "journal").glob("*.jsonl")) / 1e6,
    }
    writer.close()
    if done:
        opening = time.perf_counter()
        store = ActivationStore.open(root)
        result["seconds_open"] = time.perf_counter() - opening
        result["mb_open"] = rss_mb()
        assert len(store.layers) == args.layers
        result["seconds"] = time.perf_counter() - started
    return result


def module(*names: str, having: str = "") -> Any:
    """Return the first of some modules that this revision has, with a name in it."""
    for name in names:
        try:
            found = importlib.import_module(f"lorsa.{name}")
        except ModuleNotFoundError:
            continue
        if hasattr(found, having) or not having:
            return found
    raise ModuleNotFoundError(f"none of {', '.join(names)}")


def begin(args: argparse.Namespace, root: Path) -> Any:
    """Create the store, then let its layers share one folder."""
    import torch

    manifest_room = module("store.manifest")
    n_seq = args.tokens // args.n_ctx
    said, given = of_layers(args)
    manifest = manifest_room.Manifest(
        uuid="bench",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        lorsa_version="0",
        model={"id": "none", "revision": None},
        tokenizer={},
        corpus={"data": "none", "n_documents": 1},
        request={},
        n_seq=n_seq,
        n_ctx=args.n_ctx,
        shard_seqs=args.shard_seqs,
        dtype="bfloat16",
        compression="none",
        **said,
        held_out_shards=manifest_room.held_out_shards(n_seq, args.shard_seqs),
    )
    ids = torch.zeros(n_seq, args.n_ctx, dtype=torch.int32)
    writer = module("store.write.writer", "store.writer").StoreWriter.create(
        root,
        manifest,
        tokens=ids,
        documents=ids,
        document_names=["none"],
        **given,
    )
    for layer in range(1, args.layers):
        shutil.rmtree(root / f"layers/{layer}")
        (root / f"layers/{layer}").symlink_to("0")
    return writer


def of_layers(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a manifest and a writer are told of the layers, by the version of the code."""
    try:
        from lorsa.store.layered import pair_facts
    except ImportError:  # it knows layers
        facts: dict[int, Any] = {layer: {"weights": []} for layer in range(args.layers)}
        return {"d_model": args.d_model, "layers": facts}, {"weights": {n: {} for n in facts}}
    sites: dict[Any, Any] = {}
    for layer in range(args.layers):
        sites |= pair_facts(layer, args.d_model, "store")
    modules: dict[str, Any] = {
        f"{layer}.attention": {"weights": []} for layer in range(args.layers)
    }
    return {"sites": sites, "modules": modules}, {"modules": {name: {} for name in modules}}


def arrays_of(manifest: Any, layer: int) -> list[tuple[str, int, int]]:
    """Return name, axes of a sequence and its bytes, of each array of a layer."""
    arrays = module("store.arrays", "store.layout")
    if hasattr(arrays, "layer_arrays"):
        specs = arrays.layer_arrays(manifest, layer)
    else:
        specs = arrays.site_arrays(manifest, [site for site in manifest.sites if site[0] == layer])
    return [(s.name.rpartition("/")[2], len(s.row_shape), s.row_bytes) for s in specs]


class Loop:
    """The loop of a harvest, with made-up shards."""

    def __init__(self, writer: Any, *, limit: float) -> None:
        self.writer = writer
        self.entry = entry_kind()
        self.ends = time.perf_counter() + limit
        self.starts: list[float] = []
        self.cpu: list[float] = []
        self.mb: list[float] = []
        self.finishing = self.finished = 0.0

    def run(self) -> bool:
        """Write all shards and finish the store; return whether the time was enough."""
        shards = module("harvest.loop", "harvest.shards", having="write_shards")
        shards._write = lambda writer, shard, run, meter: self.write(shard)
        finish = self.writer.finish

        def timed() -> None:
            self.finishing = time.perf_counter()
            self.cpu.append(time.process_time())
            finish()
            self.finished = time.perf_counter()

        self.writer.finish = timed
        nothing = SimpleNamespace(estimate=lambda *_: None, report=lambda _: None)
        try:
            shards.write_shards(self.writer, nothing)
        except TimeIsUpError:
            return False
        return True

    def write(self, shard: int) -> None:
        """Commit a shard whose files are holes."""
        self.starts.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.mb.append(rss_mb())
        if self.starts[-1] > self.ends:
            raise TimeIsUpError
        manifest, begun = self.writer.manifest, self.writer.begin_shard(shard)
        layers = sorted({getattr(each, "layer", each) for each in begun})
        n_seq = len(manifest.shard_rows(shard))
        row_bytes = {array: spec_bytes for array, _, spec_bytes in arrays_of(manifest, 0)}
        n_bytes = {name: n_seq * size for name, size in row_bytes.items()}
        for name, dims, _ in arrays_of(manifest, 0):
            size = n_bytes[name]
            path = self.writer.root / f"layers/0/{name}/c/{shard}{'/0' * dims}"
            path.parent.mkdir(parents=True)
            path.touch()
            os.truncate(path, size)
        self.writer.commit(
            [
                self.entry(
                    shard, f"layers/{n}/{name}", n_seq, size, shard, n_seq * 1.5, n_seq * 2.5
                )
                for n in layers
                for name, size in n_bytes.items()
            ]
        )

    def facts(self) -> dict[str, Any]:
        """Return seconds and memory; where the time was up, what all shards would have taken."""
        n_shards = self.writer.manifest.n_shards
        starts = self.starts + ([self.finishing] if self.finishing else [])
        seconds = [end - start for start, end in pairwise(starts)]
        cpu = [end - start for start, end in pairwise(self.cpu)]
        tenth = max(1, len(seconds) // 10)
        found: dict[str, Any] = {
            "n_done": len(seconds),
            "seconds_shards": sum(seconds),
            "seconds_per_shard_first_tenth": statistics.mean(seconds[:tenth]),
            "seconds_per_shard_last_tenth": statistics.mean(seconds[-tenth:]),
            "cpu_per_shard_first_tenth": statistics.mean(cpu[:tenth]),
            "cpu_per_shard_last_tenth": statistics.mean(cpu[-tenth:]),
            "mb_first_tenth": max(self.mb[:tenth]),
            "mb_last_tenth": max(self.mb[-tenth:]),
        }
        if self.finished:
            return found | {"seconds_finish": self.finished - self.finishing}
        first, last = found["cpu_per_shard_first_tenth"], found["cpu_per_shard_last_tenth"]
        slope = (last - first) / (len(cpu) - tenth)
        first -= slope * (tenth - 1) / 2
        return found | {
            "cpu_shards_extrapolated": n_shards * first + slope * n_shards * (n_shards - 1) / 2
        }


def entry_kind() -> Any:
    """Return the kind of a journal's entry, wherever this version of the package keeps it."""
    modules = [module for name, module in sys.modules.items() if name.startswith("lorsa.store")]
    return next(module.Entry for module in modules if hasattr(module, "Entry"))


def rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def rows_of(result: dict[str, Any], args: argparse.Namespace) -> list[list[str]]:
    """Return a row of the table for the code of now and one for that of before."""
    ways = [("now", result)]
    if "before" in result:
        ways.append((result["before"]["revision"], result["before"]))
    rows = []
    for name, found in ways:
        all_shards = f"{found['seconds_shards']:,.0f}"
        if found["seconds"] is None:
            hours = found["cpu_shards_extrapolated"] / 3600
            all_shards = f"{found['n_done']:,} shards in {all_shards}; all: {hours:,.1f} h of CPU"
        rows.append(
            [
                f"{datetime.now(UTC):%Y-%m-%d}",
                name,
                f"{args.tokens:,}",
                f"{found['n_arrays']}",
                f"{found['shard_seqs']}",
                f"{found['n_shards']:,}",
                f"{found['seconds_begin']:.0f}",
                all_shards,
                ms_of(found, "first_tenth"),
                ms_of(found, "last_tenth"),
                f"{found['mb_first_tenth']:,.0f}",
                f"{found['mb_last_tenth']:,.0f}",
                "-" if found["seconds"] is None else f"{found['seconds_finish']:.1f}",
                "-" if found["seconds"] is None else f"{found['seconds_open']:.1f}",
                "-" if found["seconds"] is None else f"{found['seconds']:,.0f}",
            ]
        )
    return rows


def ms_of(found: dict[str, Any], tenth: str) -> str:
    wall, cpu = found[f"seconds_per_shard_{tenth}"], found[f"cpu_per_shard_{tenth}"]
    return f"{1e3 * wall:,.1f} ({1e3 * cpu:,.1f})"


HEAD = [
    "| date | code | tokens | arrays | sequences a shard | shards | s to begin | s, all shards "
    "| ms (CPU) a shard, first tenth | last tenth | MB, first tenth | last tenth | s to finish "
    "| s to open | s in all |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def lines_of(result: dict[str, Any], args: argparse.Namespace) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows_of(result, args)]


def table(result: dict[str, Any], args: argparse.Namespace) -> str:
    return "\n".join([*HEAD, *lines_of(result, args)])


def append_rows(result: dict[str, Any], args: argparse.Namespace) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("\n".join([*lines_of(result, args), ""]))


if __name__ == "__main__":
    main()
