"""What reading all heads of a Lorsa takes: time and memory of `lorsa analyze`.

    python benchmarks/bench_analyze.py RUN --store STORE --model MODEL --write

The command runs as a user would type it, in a process of its own, into a folder that is removed.
"others" is the share of the machine's CPU time that other processes took meanwhile.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import append_row, busy_s, machine

RESULTS = Path(__file__).parent / "results" / "bench_analyze.md"


def main() -> None:
    args = parse()
    busy, began = busy_s(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            "-m",
            "lorsa",
            "analyze",
            args.run,
            "--store",
            args.store,
            "--json",
        ]
        words += ["--out", f"{folder}/analysis"]
        words += ["--tokens", str(args.tokens)] if args.tokens else []
        words += ["--model", args.model] if args.model else []
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    facts, wall = json.loads(done.stdout), time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = os.cpu_count() or 1
    result = {
        "heads": facts["n_ov_heads"],
        "tokens": facts["n_tokens"],
        "model": bool(args.model),
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1e3,
        "tables_mb": size / 1e6,
        "others": (busy_s() - busy - used.ru_utime - used.ru_stime) / wall / cores,
        "machine": machine("torch", "lorsa"),
    }
    if args.write:
        write_row(result)
    print(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--store", required=True)
    parser.add_argument("--model", help="with it, probes and effects on the logits too")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--write", action="store_true", help=f"append a row to {RESULTS.name}")
    return parser.parse_args()


def write_row(result: dict[str, Any]) -> None:
    row = [
        f"{result['heads']:,}",
        f"{result['tokens']:,}",
        "yes" if result["model"] else "no",
        f"{result['wall_s'] / 60:.1f}",
        f"{result['cpu_s'] / 60:.1f}",
        f"{result['peak_mb']:,.0f}",
        f"{result['tables_mb']:.0f}",
        f"{result['others']:.0%}",
        result["machine"],
    ]
    append_row(RESULTS, row)


if __name__ == "__main__":
    main()
