"""Writes small stores again and again, each time in a process that is killed at a random moment.

    python drill.py FOLDER SEED N_KILLS FACTS

FACTS are those of the manifest that differ from the small store's, as JSON.

Prints one JSON object: how many processes were killed, in which stage each was, and the stores that
were finished in spite of it. Processes are forked from one that has loaded torch but computed
nothing, which costs milliseconds.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from lorsa.store.folder import is_begun, is_complete
from lorsa.store.read.reader import ActivationStore
from lorsa.store.write.writer import StoreWriter
from small import create, fill, make_manifest

FACTS = json.loads(sys.argv[4])
SHARD_S = 0.04
"""A shard takes so long at least, or few kills would hit one: most time goes by before them."""

POLL_S = 0.002


def write(root: Path) -> None:
    """Begin a store or go on with it, as a harvest does."""
    begun = is_begun(root)
    with StoreWriter.resume(root) if begun else create(root, make_manifest(**FACTS)) as writer:
        for shard in writer.missing_shards():
            fill(writer, [shard])
            time.sleep(SHARD_S)
        writer.finish()


def start(root: Path) -> int:
    """Write in a process of its own and return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(root)
            code = 0
        finally:
            os._exit(code)
    return child


def kill(child: int, after_s: float) -> bool:
    """Kill a process after some time and tell whether it was still at work."""
    ends = time.monotonic() + after_s
    while time.monotonic() < ends:
        time.sleep(POLL_S)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, "the writer failed"
            return False
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "the writer failed"
    return os.WIFSIGNALED(status)


def write_whole(root: Path) -> float:
    """Write without a kill and return how long it took, seconds."""
    started = time.monotonic()
    _, status = os.waitpid(start(root), 0)
    assert status == 0, "the writer failed"
    return time.monotonic() - started


def stage(root: Path) -> str:
    """Say how far a store had come."""
    if is_complete(root):
        return "complete"
    if not is_begun(root):
        return "begin"
    with StoreWriter.resume(root) as writer:
        return "shards" if writer.missing_shards() else "finish"


def main(folder: Path, seed: int, n_kills: int) -> None:
    """Kill so many processes, and finish every store that they worked on."""
    moments = random.Random(seed)
    whole_s = min(write_whole(folder / name) for name in ("never-killed", "nor-this"))
    stages: list[str] = []
    finished: list[str] = []
    while len(stages) < n_kills:
        root = folder / f"store{len(finished)}"
        while len(stages) < n_kills and kill(start(root), moments.uniform(0, whole_s)):
            stages.append(stage(root))
        if not is_complete(root):
            write_whole(root)
        ActivationStore.open(root)
        finished.append(root.name)
    print(json.dumps({"stages": stages, "finished": finished}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
