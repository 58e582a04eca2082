"""Lets processes write a store together, and kills one or another at random moments.

    python team.py STORE SEED N_KILLS N_WRITERS FACTS

STORE is a folder or s3://bucket/folder. FACTS are those of the manifest that differ from the small
store's, as JSON; {"add": [7]} among them adds layers to a store that is finished, {"add": "3.mlp"}
the sites of an MLP.

Whoever is killed is followed by another. After the last kill all are killed, and one process ends
the work. Prints one JSON object. Should the work be done before that many kills, it says so.
Processes are forked from one that has loaded torch but computed nothing and never been to a bucket.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lorsa.errors import BegunError
from lorsa.store.folder import is_begun, sites_being_added
from lorsa.store.locks import lease
from lorsa.store.places import Place, place
from lorsa.store.write.writer import StoreWriter
from small import add_layers, add_sites, create, make_manifest, mlp, values_of

SHARD_S = 0.2
"""How long a process is in the middle of a shard."""


def join(root: Place, facts: dict[str, Any]) -> StoreWriter:
    """Begin the work, or join those who do it."""
    facts = dict(facts)
    added = facts.pop("add", None)
    try:
        if added is None:
            return (
                StoreWriter.resume(root) if is_begun(root) else create(root, make_manifest(**facts))
            )
        if sites_being_added(root):
            return StoreWriter.resume(root)
        return add_layers(root, added) if added != "3.mlp" else add_sites(root, mlp())
    except (BegunError, ValueError):  # another has begun, or ended, it
        return StoreWriter.resume(root)


def write(root: Place, facts: dict[str, Any]) -> None:
    """Do what a harvest does in one of its processes."""
    with join(root, facts) as writer:
        held = values_of(writer.manifest)
        for shard in writer.claimed_shards():
            with writer.shard(shard, wait=bool(os.getpid() % 2)) as session:
                rows = writer.manifest.shard_rows(shard)
                for seq in rows:
                    if seq == rows.stop - 1:
                        time.sleep(SHARD_S)
                    session.append({site: held[site][[seq]] for site in writer.sites_to_write})
        writer.finish()


def start(root: Place, facts: dict[str, Any]) -> int:
    """Write in a process of its own and return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(root, facts)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def kill(child: int) -> bool:
    """Kill a process and tell whether it was still at work."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "a writer failed"
    return os.WIFSIGNALED(status)


def main(root: Place, seed: int, n_kills: int, n_writers: int, facts: dict[str, Any]) -> None:
    """Kill so many processes, then let one end the work."""
    moments = random.Random(seed)
    team = [start(root, facts) for _ in range(n_writers)]
    n_killed, done_early = 0, False
    while n_killed < n_kills and not done_early:
        time.sleep(moments.uniform(0, SHARD_S))
        i = moments.randrange(n_writers)
        was_at_work = kill(team[i])
        n_killed += was_at_work
        done_early = not was_at_work
        team[i] = start(root, facts)
    n_killed += sum([kill(child) for child in team]) if n_kills else 0
    for child in [] if n_kills else team:
        _, status = os.waitpid(child, 0)
        assert status == 0, "a writer failed"
    _, status = os.waitpid(start(root, facts), 0)
    assert status == 0, "the last writer failed"
    print(json.dumps({"n_kills": n_killed, "done_early": done_early}))


if __name__ == "__main__":
    if sys.argv[1].startswith("s3:"):  # as if each writer were on a machine of its own
        lease.DEAD_S, lease.RENEW_S, lease._machine = 4.0, 0.5, lambda: None
    main(place(sys.argv[1]), *map(int, sys.argv[2:5]), json.loads(sys.argv[5]))
