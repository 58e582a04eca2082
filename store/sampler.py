"""Which sequences make up which batch: a pure function of (seed, epoch), for any number of ranks.

The shards are permuted, taken in windows of some thousand sequences, and the sequences permuted
within each window: a small store is shuffled whole, a large one is read in regions. All randomness
is sorting by a hash of (seed, epoch, stage), so it does not change with the version of any
library's shuffle.
"""

import numpy as np
import numpy.typing as npt

WINDOW_SEQS = 8192

Ids = npt.NDArray[np.int64]


def _permuted(values: Ids, seed: int, epoch: int, stage: int) -> Ids:
    """Return the values in a random order fixed by the three numbers."""
    counter = np.array([0, stage, epoch, 0], dtype=np.uint64)
    generator = np.random.Philox(key=seed, counter=counter)
    keys = generator.random_raw(len(values))
    return values[np.argsort(keys, kind="stable")]


def sequence_order(
    seqs: Ids, shard_seqs: int, *, seed: int, epoch: int, window_seqs: int = WINDOW_SEQS
) -> Ids:
    """Return the order in which an epoch visits the sequences.

    Args:
        seqs: sequence numbers to visit.
        shard_seqs: sequences in a shard of the store.
        seed, epoch: of the order.
        window_seqs: sequences that are mixed with each other, at least; whole shards are taken.

    Returns:
        `seqs`, each once.
    """
    shard_of = seqs // shard_seqs
    shards = _permuted(np.unique(shard_of), seed, epoch, 0)
    window_shards = max(1, -(-window_seqs // shard_seqs))
    windows = []
    for first in range(0, len(shards), window_shards):
        window = seqs[np.isin(shard_of, shards[first : first + window_shards])]
        windows.append(_permuted(window, seed, epoch, 1 + first))
    return np.concatenate(windows)


class Sampler:
    """The batches of one rank; every rank has as many, together they are the global batches."""

    def __init__(
        self,
        seqs: Ids,
        shard_seqs: int,
        *,
        batch_seqs: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Set what is drawn and by whom.

        Args:
            seqs: sequences to draw from.
            shard_seqs: sequences in a shard of the store.
            batch_seqs: sequences in a global batch, over all ranks.
            seed: of the order.
            rank, world: which of how many processes this is.

        Raises:
            ValueError: a batch cannot be filled, or not be split evenly.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; allowed: 0..{world - 1}")
        if batch_seqs < 1 or batch_seqs % world:
            raise ValueError(
                f"batch_seqs is {batch_seqs}; it must be a multiple of the {world} processes"
            )
        if len(seqs) < batch_seqs:
            raise ValueError(f"a batch is {batch_seqs} sequences; only {len(seqs)} are there")
        self._seqs = seqs
        self._shard_seqs = shard_seqs
        self._batch_seqs = batch_seqs
        self._seed = seed
        self._rank = rank
        self._world = world
        self._epoch = -1
        self._order = seqs

    @property
    def n_batches(self) -> int:
        """Batches in an epoch; sequences that do not fill one wait for another epoch."""
        return len(self._seqs) // self._batch_seqs

    def batch(self, step: int) -> Ids:
        """Return this rank's sequences of a step, counted from the start of training."""
        epoch, position = divmod(step, self.n_batches)
        if epoch != self._epoch:
            self._order = sequence_order(self._seqs, self._shard_seqs, seed=self._seed, epoch=epoch)
            self._epoch = epoch
        n_mine = self._batch_seqs // self._world
        first = position * self._batch_seqs + self._rank * n_mine
        return self._order[first : first + n_mine]
