"""Kill drill of added sites: two processes killed twenty times, then one that ends the work.

    python benchmarks/once/kill_sites.py [--kills 20] [--processes 2] [--seed 0]

A tiny language model's attention is harvested; then the sites of its MLP and residual stream are
added by processes that are killed at random moments, and each is followed by another. A shard takes
a while, or the work would be done before the last kill. Every file of
the arrays, weights and channels has to be, byte for byte, what one process writes that is never
killed. Prints one JSON object.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from drills import harvest_config, prepare_model
from lorsa.harvest import loop
from lorsa.harvest.harvest import harvest
from lorsa.store.care.repair import verify_store
from small import digests

CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8, derived": {"dtype": "int8", "outputs": "derive"},
}


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        prepare_model(Path(folder))
        found = {name: drill(Path(folder), name, args) for name in CASES}
    print(json.dumps(found))
    sys.exit(not all(case["same"] and case["whole"] for case in found.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def drill(root: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Kill the addition of sites to a store; return what came of it."""
    chance = random.Random(f"{args.seed} {name}")
    store, whole = root / name / "acts", root / name / "whole"
    settings = CASES[name] | {"layers": "all"}
    wait(start(root, store, settings))
    shutil.copytree(store, whole)
    settings |= {"sites": "attn,mlp,resid"}
    began = time.monotonic()
    wait(start(root, whole, settings))
    seconds = time.monotonic() - began
    slow = partial(start, root, store, settings, shard_s=seconds)
    team = [slow() for _ in range(args.processes)]
    n_killed, done_early = 0, False
    while n_killed < args.kills and not done_early:
        time.sleep(chance.uniform(0, seconds))
        i = chance.randrange(args.processes)
        was_at_work = kill(team[i])
        n_killed += was_at_work
        done_early = not was_at_work
        team[i] = slow()
    n_killed += sum([kill(child) for child in team])
    wait(start(root, store, settings))
    found = verify_store(store, full=True)
    return {
        "n_kills": n_killed,
        "done_early": done_early,
        "same": digests(store) == digests(whole),
        "whole": found["ok"] and not found["leftovers"],
        "n_files": found["n_files"],
    }


def start(root: Path, store: Path, settings: dict[str, Any], shard_s: float = 0.0) -> int:
    """Harvest in a process of its own, so long a shard at least, and return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        loop._write = partial(slowly, loop._write, shard_s)
        harvest(harvest_config(root, **settings, store=store))
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        os._exit(code)


def slowly(work: Any, seconds: float, *args: Any) -> None:
    work(*args)
    time.sleep(seconds)


def kill(child: int) -> bool:
    """Kill a process and tell whether it was still at work."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "a harvest failed"
    return os.WIFSIGNALED(status)


def wait(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, "a harvest failed"


if __name__ == "__main__":
    main()
