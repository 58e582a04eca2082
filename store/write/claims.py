"""Shares the shards of a store among the processes that write it: each claims one at a time.

There are no ranks. A process takes the first missing shard that nobody has, and at the end waits
for what others have: one that dies frees its claim, and those that wait take the shard over.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ...errors import BusyError
from ..locks.lock import POLL_S, Claim, Lock
from .standing import Standing

LOOK_S = 5.0
"""At most, between two looks at what others have claimed."""


def claim_shards(
    lock: Lock,
    standing: Standing,
    layers: Sequence[int],
    waiting: Callable[[int], None] = lambda n_shards: None,
) -> Iterator[tuple[int, Claim]]:
    """Yield shards that lack some of these layers, with a claim to each for the caller to release.

    Args:
        lock: held.
        standing: what is known of the store; kept up to date.
        layers: to be written.
        waiting: told, again and again, for how many shards of others this waits.
    """
    standing.look()
    given: set[int] = set()
    pause_s = POLL_S
    while todo := [shard for shard in standing.lacking(layers) if shard not in given]:
        shard, claim = _claim_one(lock, todo)
        if claim is None:
            waiting(len(todo))
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LOOK_S)
            standing.read()
            continue
        standing.read()  # another may have written it before the claim
        if standing.lacks(shard, layers):
            given.add(shard)
            yield shard, claim
        else:
            claim.release()


def _claim_one(lock: Lock, shards: Sequence[int]) -> tuple[int, Claim | None]:
    """Claim one of some shards; None, with any of them, if others hold them all.

    What seems to be held, by the living or the dead, is tried after the rest.
    """
    held = lock.claimed()
    for shard in sorted(shards, key=lambda shard: str(shard) in held):
        if (claim := lock.claim(str(shard))) is not None:
            return shard, claim
    return shards[0], None


@contextmanager
def claimed(lock: Lock, name: str, wait_s: float, *, busy: str) -> Iterator[None]:
    """Hold a claim, waiting for it so long; raises BusyError with that message if in vain."""
    ends = time.monotonic() + wait_s
    while (claim := lock.claim(name)) is None:
        if time.monotonic() >= ends:
            raise BusyError(busy)
        time.sleep(POLL_S)
    try:
        yield
    finally:
        claim.release()
