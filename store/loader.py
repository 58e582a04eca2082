"""Feed batches of a store to a training step, read ahead by threads.

Threads, never forked processes: a read releases the interpreter lock, and a forked copy of a
process that runs threads can hang. The threads only move bytes: one tensor operation in a thread
would give it an OpenMP pool of its own, and the training step's pool, which then has to share the
cores, takes twice as long.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from .reader import Activations, ActivationStore
from .sampler import Sampler

PREFETCH_BATCHES = 4


class Batch(NamedTuple):
    """What one rank computes in one step, in the store's dtype."""

    x: Tensor
    """[batch, n_ctx, d_model]"""
    y: Tensor
    """[batch, n_ctx, d_model]"""
    wait_s: float
    """How long the step had to wait for it, seconds"""


def batches(
    store: ActivationStore, layer: int, sampler: Sampler, *, first_step: int, n_steps: int
) -> Iterator[Batch]:
    """Yield the batches of steps first_step..n_steps - 1, reading ahead.

    Args:
        store, layer: what to read.
        sampler: which sequences each step takes.
        first_step: where to begin; any step costs the same.
        n_steps: where to end.
    """
    pool = ThreadPoolExecutor(2, thread_name_prefix="lorsa-reader")
    waiting: deque[Future[Activations]] = deque()
    ahead = iter(range(first_step, n_steps))
    try:
        while True:
            while len(waiting) < PREFETCH_BATCHES and (step := next(ahead, None)) is not None:
                waiting.append(pool.submit(store.activations, layer, sampler.batch(step)))
            if not waiting:
                return
            started = time.perf_counter()
            x, y = waiting.popleft().result()
            yield Batch(x, y, time.perf_counter() - started)
    finally:
        pool.shutdown(cancel_futures=True)


def held_out_batches(
    store: ActivationStore, layer: int, *, batch_seqs: int, n_tokens: int | None = None
) -> Iterator[Activations]:
    """Yield x and y of the held-out sequences in order, at most about n_tokens of them.

    Args:
        store, layer: what to read.
        batch_seqs: sequences in a batch.
        n_tokens: stop once so many are read (rounded up to whole sequences); None reads all.
    """
    seqs = store.held_out_seqs
    if n_tokens is not None:
        seqs = seqs[: max(1, -(-n_tokens // store.manifest.n_ctx))]
    for first in range(0, len(seqs), batch_seqs):
        yield store.activations(layer, seqs[first : first + batch_seqs])
