"""Compare frozen runs of two versions to the bit.

    python benchmarks/same_bits.py --before 14518a9
    python benchmarks/same_bits.py --before HEAD --only 'train|sweep' --json

The code of a commit and the code here do the jobs of frozen_jobs.py side by side, each in a process
and a folder of its own, in one thread, with the same models and texts. These are harvests in every
encoding, runs with the main settings, alone, in groups, stopped and gone on with, evaluations,
analyses, conversions, and commands. The SHA-256 of all that they make are compared, but for
identities and clocks; frozen_digests.py lists what is left out. Exit code 1 if anything differs or
failed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from frozen_digests import Parts, of_data
from frozen_inputs import make_inputs
from frozen_jobs import DIGESTS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "same_bits.md"
SHOWN_DIGITS = 12
"""Of a SHA-256 in the table."""


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder / "inputs")
        check_out(args.before, folder / "before" / "lorsa")
        (folder / "after").mkdir()
        (folder / "after" / "lorsa").symlink_to(ROOT, target_is_directory=True)
        begun = [begin_jobs(folder, which, args.only) for which in ("before", "after")]
        try:
            ended = [process.wait() for process in begun]
        finally:
            for process in begun:
                process.kill()
        if any(ended):
            sys.exit(f"the jobs did not end: exit codes {ended}")
        before, after = (digests(folder, which) for which in ("before", "after"))
    rows = compare(before, after)
    result = {
        "before": commit(args.before),
        "after": commit("HEAD") + (" with changes" if has_changes() else ""),
        "n_jobs": len(rows),
        "n_equal": sum(row["equal"] for row in rows),
        "rows": rows,
        "machine": machine(),
    }
    if args.write:
        write_table(result)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{table(rows)}\n\n{result['n_equal']} of {result['n_jobs']} jobs are equal")
    sys.exit(0 if rows and result["n_equal"] == result["n_jobs"] else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", required=True, metavar="REV", help="commit to compare with")
    parser.add_argument("--only", default="", help="jobs whose names match this expression")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help=f"add the table to {RESULTS.name}")
    return parser.parse_args()


def git(*words: str) -> bytes:
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def commit(revision: str) -> str:
    return git("rev-parse", "--short", f"{revision}^{{commit}}").decode().strip()


def has_changes() -> bool:
    return bool(git("status", "--porcelain"))


def check_out(revision: str, folder: Path) -> None:
    """Write the files of a commit into a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=git("archive", revision), check=True)


def begin_jobs(folder: Path, which: str, only: str) -> subprocess.Popen[bytes]:
    """Begin the jobs with the code in a folder.

    Args:
        folder: with the inputs, and code in `which`.
        which: "before" or "after".
        only: jobs whose names match this expression.
    """
    work = folder / f"work-{which}"
    shutil.copytree(folder / "inputs", work)
    environment = os.environ | {
        "PYTHONPATH": str(folder / which),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TQDM_DISABLE": "1",
    }
    script = str(Path(__file__).parent / "frozen_jobs.py")
    words = [sys.executable, script, str(work), "--only", only]
    return subprocess.Popen(words, env=environment, cwd=work, stdout=subprocess.DEVNULL)


def digests(folder: Path, which: str) -> dict[str, Parts]:
    """Return what the jobs came to, by their names."""
    found = json.loads((folder / f"work-{which}" / DIGESTS).read_text("utf-8"))
    if Path(found["code"]) != folder / which / "lorsa":
        sys.exit(f"{which} ran {found['code']}, not the code of {folder / which}")
    jobs: dict[str, Parts] = found["jobs"]
    return jobs


def compare(before: dict[str, Parts], after: dict[str, Parts]) -> list[dict[str, Any]]:
    """Return a row per job; a job that failed on a side is not equal."""
    rows = []
    for job in dict.fromkeys([*before, *after]):
        one, other = before.get(job, {}), after.get(job, {})
        parts = dict.fromkeys([*one, *other])
        different = [p for p in parts if one.get(p) != other.get(p) or p == "error"]
        rows.append(
            {
                "job": job,
                "before": one.get("error") or of_data(one),
                "after": other.get("error") or of_data(other),
                "equal": bool(parts) and not different,
                "different": different,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| job | sha256 before | after | equal |", "|---|---|---|---|"]
    for row in rows:
        digests = [
            row[side] if "error" in row["different"] else row[side][:SHOWN_DIGITS]
            for side in ("before", "after")
        ]
        equal = "yes" if row["equal"] else f"no: {', '.join(row['different'])}"
        lines.append("| " + " | ".join([row["job"], *digests, equal]) + " |")
    return "\n".join(lines)


def machine() -> str:
    return (
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def write_table(result: dict[str, Any]) -> None:
    heading = (
        f"\n{datetime.now(UTC):%Y-%m-%d}, {result['before']} and {result['after']}: "
        f"{result['n_equal']} of {result['n_jobs']} jobs are equal; {result['machine']}.\n"
    )
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(f"{heading}\n{table(result['rows'])}\n")


if __name__ == "__main__":
    main()
