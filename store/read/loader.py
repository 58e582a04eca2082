"""Batches of a store for a training step, read ahead by threads.

Threads, never forked processes: a read releases the interpreter lock, and a forked copy of a
process that runs threads can hang. The threads only move bytes: one tensor operation in a thread
would give it an OpenMP pool of its own, and the training step's pool, which then has to share the
cores, takes twice as long.

Batches are read into a ring of buffers that are reused: fresh memory costs a page fault per 4 kB,
which takes as long as the read. For a GPU the ring is pinned, so that copies to it need no CPU.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...sites import Ports, Site
from ..arrays import norms_at
from ..encoding import DTYPES, Encoded, disk_view
from ..site_facts import scale_of
from .reader import ActivationStore
from .rows import Seqs
from .stored import Activations, Derive, Stored

PREFETCH_BATCHES = 4
READ_THREADS = min(PREFETCH_BATCHES, max(2, os.cpu_count() or 1))


class Batch(NamedTuple):
    """Batch of one rank in one step."""

    stored: Stored
    """Activations as they lie in the store; overwritten once the next batch is asked for"""
    wait_s: float
    """Seconds that the step waited for the batch"""
    seqs: Seqs
    """Numbers of the sequences, [n]"""


class Order(Protocol):
    """Order of sequences over steps, such as `Sampler`."""

    def batch(self, step: int) -> Seqs:
        """Return the numbers of the sequences of a step."""


class _Slot:
    """Memory of one batch, which is reused."""

    def __init__(self, store: ActivationStore, ports: Ports, n_seqs: int, *, pin: bool) -> None:
        self.n_seqs = n_seqs
        self._memory: dict[str, Tensor] = {}
        self._store = store
        self._ports = ports
        for name in _arrays(store, ports):
            spec = store.reader(name).spec
            shape, dtype = (n_seqs, *spec.row_shape), DTYPES[spec.dtype]
            self._memory[name] = torch.empty(shape, dtype=dtype, pin_memory=pin)
        self._disk = {name: disk_view(memory) for name, memory in self._memory.items()}

    def fill(self, seqs: Seqs) -> None:
        """Read sequences into the memory; in a thread."""
        for name, out in self._disk.items():
            self._store.reader(name).read_into(seqs, out[: len(seqs)])

    def stored(self, n_seqs: int) -> Stored:
        """Return the activations that were read, sharing the memory."""
        store = self._store
        parts = {site: self._part(site, n_seqs) for site in store.sources(self._ports)}
        known = {
            site: store.known_norms(site, self._norms(site, n_seqs))
            for site in store.derived(self._ports)
        }
        return Stored(self._ports, parts, known)

    def _part(self, site: Site, n_seqs: int) -> Encoded:
        scale = self._memory.get(scale_of(site.path))
        values, channel = self._memory[site.path][:n_seqs], self._store.channel(site)
        return Encoded(values, None if scale is None else scale[:n_seqs], channel)

    def _norms(self, site: Site, n_seqs: int) -> Tensor:
        array, column = norms_at(self._store.manifest, site)
        norms = self._memory[array][:n_seqs]
        return norms if column is None else norms[..., column]


def _arrays(store: ActivationStore, ports: Ports) -> list[str]:
    """Return the arrays that a batch is made of, each once."""
    names: list[str] = []
    for site in store.sources(ports):
        names += [site.path] if store.channel(site) is None else [site.path, scale_of(site.path)]
    names += [norms_at(store.manifest, site).array for site in store.derived(ports)]
    return list(dict.fromkeys(names))


class _Reading(NamedTuple):
    slot: _Slot
    seqs: Seqs
    done: Future[None]


def batches(
    store: ActivationStore,
    ports: Ports,
    order: Order,
    *,
    first_step: int,
    n_steps: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of steps first_step..n_steps - 1, reading ahead.

    Args:
        store, ports: store and sites to read.
        order: sequences of each step.
        first_step: first step; starting late costs nothing.
        n_steps: steps of the run; the last batch is that of step n_steps - 1.
        pin: whether to read into pinned memory, for a GPU.

    Raises:
        StoreError: a site is not there, or a chunk is missing or damaged.
    """
    store.require_sites(ports.sites)
    pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="lorsa-reader")
    reading: deque[_Reading] = deque()
    free: deque[_Slot] = deque()
    ahead = iter(range(first_step, n_steps))
    try:
        while True:
            while len(reading) < PREFETCH_BATCHES and (step := next(ahead, None)) is not None:
                seqs = order.batch(step)
                slot = free.popleft() if free else None
                if slot is None or slot.n_seqs < len(seqs):
                    slot = _Slot(store, ports, len(seqs), pin=pin)
                reading.append(_Reading(slot, seqs, pool.submit(slot.fill, seqs)))
            if not reading:
                return
            started = time.perf_counter()
            slot, seqs, done = reading.popleft()
            done.result()
            yield Batch(slot.stored(len(seqs)), time.perf_counter() - started, seqs)
            free.append(slot)
    finally:
        pool.shutdown(cancel_futures=True)


def held_out_parts(
    store: ActivationStore, *, batch_seqs: int, n_tokens: int | None = None
) -> Iterator[Seqs]:
    """Yield the numbers of the held-out sequences in order, batch by batch.

    Args:
        store: store to read.
        batch_seqs: sequences in a batch.
        n_tokens: most tokens, rounded up to whole sequences; None takes all.
    """
    seqs = store.held_out_seqs
    if n_tokens is not None:
        seqs = seqs[: max(1, -(-n_tokens // store.manifest.n_ctx))]
    for first in range(0, len(seqs), batch_seqs):
        yield seqs[first : first + batch_seqs]


def held_out_batches(
    store: ActivationStore,
    ports: Ports,
    *,
    batch_seqs: int,
    n_tokens: int | None = None,
    device: torch.device | str = "cpu",
    derive: Derive | None = None,
) -> Iterator[Activations]:
    """Yield x and y of the held-out sequences in order, float32.

    Args:
        store, ports: store and sites to read.
        batch_seqs, n_tokens: as in `held_out_parts`.
        device: device of the result.
        derive: computes sites that are not stored.
    """
    for seqs in held_out_parts(store, batch_seqs=batch_seqs, n_tokens=n_tokens):
        yield store.stored(ports, seqs).on(device, derive)
