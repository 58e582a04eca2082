"""Claims by which the processes that write a store share its shards, one at a time.

There are no ranks. A process takes the first missing shard that no other has claimed, and in the
end waits for those that others have. A process that dies frees its claim, and one that waits takes
the shard over.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from ...errors import BusyError
from ...sites import Site
from ..locks.lock import LOCK_POLL_S, Claim, Lock
from ..waiting import waiting_for
from .status import ShardStatus

REFRESH_S = 5.0
"""Most seconds between two tries for the shards that others have claimed"""


def claim_shards(
    lock: Lock,
    status: ShardStatus,
    sites: Sequence[Site],
    waiting: Callable[[int], None] = lambda n_shards: None,
) -> Iterator[tuple[int, Claim]]:
    """Yield the shards that lack some sites, each with its claim, which the caller releases.

    Args:
        lock: lock of the store, which is held.
        status: status of the shards; it is kept up to date.
        sites: sites to be written.
        waiting: called, again and again, with how many shards of others this waits for.
    """
    status.refresh()
    status.take_changed()
    todo = OrderedDict.fromkeys(status.missing_shards(sites))
    given: set[int] = set()

    def read() -> None:
        status.read()
        for shard in status.take_changed() - given:
            if status.missing_sites(shard, sites):
                todo.setdefault(shard)
            else:
                todo.pop(shard, None)

    pause_s = LOCK_POLL_S
    while todo:
        shard, claim = _claim_one(lock, todo)
        if claim is None:
            waiting(len(todo))
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, REFRESH_S)
            read()
            continue
        read()  # another may have written it before the claim
        todo.pop(shard, None)
        if status.missing_sites(shard, sites):
            given.add(shard)
            yield shard, claim
        else:
            claim.release()


def _claim_one(lock: Lock, shards: Collection[int]) -> tuple[int, Claim | None]:
    """Claim one of some shards; None, with any of them, if others hold all claims.

    Shards that have a claim, perhaps of a dead process, are tried last.
    """
    held = lock.claimed()
    seems_held = []
    for shard in shards:
        if str(shard) in held:
            seems_held.append(shard)
        elif (claim := lock.claim(str(shard))) is not None:
            return shard, claim
    for shard in seems_held:
        if (claim := lock.claim(str(shard))) is not None:
            return shard, claim
    return next(iter(shards)), None


@contextmanager
def claimed(lock: Lock, name: str, wait_s: float, *, busy: str) -> Iterator[None]:
    """Hold a claim during a block; wait for it, and raise BusyError with a message if in vain."""
    ends = time.monotonic() + wait_s
    with waiting_for(f"another process that has claimed {name!r} of the same store"):
        while (claim := lock.claim(name)) is None:
            if time.monotonic() >= ends:
                raise BusyError(busy)
            time.sleep(LOCK_POLL_S)
    try:
        yield
    finally:
        claim.release()
