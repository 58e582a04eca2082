"""Order of sequences in training: a function of (seed, epoch), for any number of ranks.

The shards are permuted, taken in windows of some thousand sequences, and the sequences permuted
within each window. A small store is shuffled whole; a large one is read in regions. All randomness
is sorting by a hash of (seed, epoch, stage), so it does not depend on the shuffle of any library's
version.

Epochs follow each other without a gap: a batch that an epoch does not fill takes its last sequences
from the next. So every epoch visits every sequence once, and step s begins at sequence
s * batch_seqs of the run, from which any number of ranks can resume.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

WINDOW_SEQS = 8192

SeqIds = npt.NDArray[np.int64]


def _shuffle(n: int, seed: int, epoch: int, stage: int) -> SeqIds:
    """Return 0..n - 1 in a random order fixed by the three numbers."""
    counter = np.array([0, stage, epoch, 0], dtype=np.uint64)
    generator = np.random.Philox(key=seed, counter=counter)
    return np.argsort(generator.random_raw(n), kind="stable")


def sequence_order(
    seqs: SeqIds, shard_seqs: int, *, seed: int, epoch: int, window_seqs: int = WINDOW_SEQS
) -> SeqIds:
    """Return the order in which an epoch visits the sequences.

    Args:
        seqs: sequence numbers to visit.
        shard_seqs: sequences in a shard of the store.
        seed, epoch: numbers that fix the order.
        window_seqs: fewest sequences in a window, if there are so many; windows are whole shards.

    Returns:
        `seqs`, each once.
    """
    shards, shard_index = np.unique(seqs // shard_seqs, return_inverse=True)
    n_windows = max(1, len(shards) // max(1, -(-window_seqs // shard_seqs)))
    place = np.empty(len(shards), dtype=np.int64)
    place[_shuffle(len(shards), seed, epoch, 0)] = np.arange(len(shards))
    window = (place * n_windows // len(shards))[shard_index]  # [n_seqs]
    mixed = _shuffle(len(seqs), seed, epoch, 1)
    order: SeqIds = seqs[mixed[np.argsort(window[mixed], kind="stable")]]
    return order


class Sampler:
    """Batches of one rank: its part of every global batch.

    If a batch cannot be split evenly, the parts differ by one sequence.
    """

    def __init__(
        self,
        seqs: SeqIds,
        shard_seqs: int,
        *,
        batch_seqs: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Set the sequences and this rank's part of them.

        Args:
            seqs: sequences to draw from.
            shard_seqs: sequences in a shard of the store.
            batch_seqs: sequences in a global batch, over all ranks.
            seed: number that fixes the order.
            rank, world: number of this process and of all processes.

        Raises:
            ValueError: a batch cannot be filled, or leaves a rank with nothing.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; allowed: 0..{world - 1}")
        if batch_seqs < world:
            raise ValueError(
                f"batch_seqs is {batch_seqs}; allowed: {world}, the processes, or more"
            )
        if len(seqs) < batch_seqs:
            raise ValueError(f"a batch is {batch_seqs} sequences; only {len(seqs)} are there")
        self._seqs = seqs
        self._batch_seqs = batch_seqs
        self._rank = rank
        self._world = world

        def order(epoch: int) -> SeqIds:
            return sequence_order(seqs, shard_seqs, seed=seed, epoch=epoch)

        self._order = lru_cache(2)(order)

    @property
    def n_batches(self) -> int:
        """Number of batches that lie wholly in the first epoch."""
        return len(self._seqs) // self._batch_seqs

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch in which a step begins, and the sequences of it that were seen."""
        return divmod(step * self._batch_seqs, len(self._seqs))

    def batch(self, step: int) -> SeqIds:
        """Return this rank's sequences of a step, counted from the start of training."""
        first = self._rank * self._batch_seqs // self._world
        return self._part(step, first, (self._rank + 1) * self._batch_seqs // self._world)

    def whole_batch(self, step: int) -> SeqIds:
        """Return all ranks' sequences of a step."""
        return self._part(step, 0, self._batch_seqs)

    def _part(self, step: int, first: int, last: int) -> SeqIds:
        wanted = last - first
        epoch, position = divmod(step * self._batch_seqs + first, len(self._seqs))
        here = self._order(epoch)[position : position + wanted]
        if len(here) == wanted:
            return here
        return np.concatenate((here, self._order(epoch + 1)[: wanted - len(here)]))
