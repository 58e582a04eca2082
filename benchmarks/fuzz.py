"""What commands make of inputs that are mistyped, damaged or odd at random.

    PYTHONPATH=tests python benchmarks/fuzz.py --minutes 10 --write
    PYTHONPATH=tests python benchmarks/fuzz.py --case 317        # one case, with all that it said

A case (tests/fuzzing.py) holds where the command ends with 0, 1 or 2 within two minutes, prints one
JSON object, and says on stderr, in a line that begins with "error:", why it failed.
"""

import argparse
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fuzzing import Outcome, fuzz, make_world, run_case
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from tiny import N_CTX, TEXT, make_model, make_tokenizer

RESULTS = Path(__file__).parent / "results" / "fuzz.md"


def make(folder: Path) -> Path:
    """Make the model, text, store, run and analysis that cases damage copies of."""
    model, text, store = folder / "model", folder / "text", folder / "acts"
    make_model("llama-gqa").save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    text.mkdir()
    words = TEXT.split()
    for i in range(12):
        (text / f"doc{i}.txt").write_text(" ".join(words[i * 7 :] + words[: i * 7]), "utf-8")
    settings: dict[str, Any] = {
        "layers": "1,2",
        "n_ctx": N_CTX,
        "tokens": 20 * N_CTX,
        "device": "cpu",
    }
    harvest(HarvestConfig(model=str(model), data=str(text), store=store, **settings))
    world = folder / "world"
    world.mkdir()
    make_world(world, model, text, store)
    return world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorsa-fuzz-") as folder:
        world = make(Path(folder))
        if args.case is not None:
            found = run_case(args.case, world, world.parent / "case")
            print(*found.argv, f"\n{found.changed}\n{found.code}\n{found.out}\n{found.err}")
            for trace in world.parent.glob("lorsa-trace-*"):
                print(trace.read_text())
            return
        counts: Counter[tuple[str, str]] = Counter()

        def report(seed: int, found: Outcome) -> None:
            name = " ".join(found.argv[: 2 if found.argv[0] == "store" else 1])
            counts[name, "cases"] += 1
            counts[name, f"ended with {found.code}"] += 1
            if found.fault is not None:
                counts[name, "faults"] += 1
                last = (found.err.strip().splitlines() or [""])[-1]
                print(
                    f"case {seed}: {found.fault}: {found.argv}: {found.changed}: {last}", flush=True
                )

        seeds = range(args.first, args.first + 10**9)
        n = fuzz(world, seeds, seconds=60 * args.minutes, report=report)
        lines = [
            f"# Commands on inputs that are mistyped, damaged or odd: {n:,} cases",
            "",
            f"`benchmarks/fuzz.py --minutes {args.minutes:g} --first {args.first}`, "
            f"{datetime.now(UTC):%Y-%m-%d}. A fault is a trace, a crash, a hang, an exit code that "
            "is not promised, or no JSON.",
            "",
            "| command | cases | done | a line | wrong request | faults |",
            "|---|---|---|---|---|---|",
        ]
        for name in sorted({name for name, _ in counts}):
            cells = ("cases", "ended with 0", "ended with 1", "ended with 2", "faults")
            lines.append(f"| {name} | " + " | ".join(str(counts[name, c]) for c in cells) + " |")
        print("\n".join(lines))
        if args.write:
            RESULTS.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
