"""Harvests one store with two processes at a time, which are killed at random moments.

    python drill.py CONFIG SEED N_KILLS

CONFIG are the settings of a `HarvestConfig` as JSON. A launch is what accelerate's is to a harvest:
two processes that know their rank. Prints one JSON object: how many of those killed were at work
on shards, and how many shards were committed after each launch. Processes are forked from one that
has loaded torch and transformers but computed nothing, which costs milliseconds.
"""

import json
import os
import random
import signal
import sys
import time

import transformers.models.llama.modeling_llama  # noqa: F401 - or each child loads it
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.events import Progress
from lorsa.harvest.harvest import harvest
from lorsa.store.care.info import store_info
from lorsa.store.folder import is_begun, is_complete
from lorsa.store.places import Place

WORLD = 2
BATCH_S = 0.12
"""A batch takes so long at least: the tiny model is too quick to be killed."""

LEAST_PACE = 0.2
"""Of the pace that launches are killed at, or none would get anywhere again."""


def slow(event: object) -> None:
    """Take some time for every batch."""
    if isinstance(event, Progress):
        time.sleep(BATCH_S)


def start(config: HarvestConfig, rank: int) -> int:
    """Harvest in a process of its own and return its id."""
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        code = 1
        try:
            harvest(config, report=slow)
            code = 0
        finally:
            os._exit(code)
    return child


def has_ended(child: int) -> bool:
    """Tell whether a process has ended by itself; it must have ended well."""
    pid, status = os.waitpid(child, os.WNOHANG)
    assert pid == 0 or status == 0, "a process failed"
    return pid != 0


def shards(store: Place) -> tuple[int, int]:
    """Return how many shards of a store are committed, and how many are missing."""
    if not is_begun(store):
        return 0, 0
    facts = store_info(store)
    missing = int(facts["n_missing_shards"])
    return int(facts["n_shards"]) - missing, missing


def main(config: HarvestConfig, seed: int, n_kills: int) -> None:
    """Launch and kill, one process after the other, until so many were killed."""
    moments = random.Random(seed)
    n_killed, committed = 0, [0]
    pace = 1.0  # of this machine: a launch has to get somewhere before it is killed
    while n_killed < n_kills:
        assert not is_complete(config.store), "it was finished before all kills"
        children = [start(config, rank) for rank in range(WORLD)]
        time.sleep(pace * moments.uniform(0.3, 1.5))
        moments.shuffle(children)
        for child in children:
            if not has_ended(child):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                n_killed += 1
            time.sleep(moments.uniform(0, 0.3))
        n_committed, n_missing = shards(config.store)
        gained = n_committed - committed[-1]
        committed.append(n_committed)
        share = n_missing * WORLD / max(n_kills - n_killed, 1)  # of each launch that is to come
        pace = max(LEAST_PACE, pace * (1.6 if not gained else min(0.9, share / gained)))
    print(json.dumps({"n_killed": n_killed, "committed": committed}))


if __name__ == "__main__":
    main(HarvestConfig(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
