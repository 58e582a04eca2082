"""Which rank sees what, when."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lorsa.store.read.sampler import Sampler, sequence_order


@settings(max_examples=100, deadline=None)
@given(
    n_seqs=st.integers(7, 300),
    shard_seqs=st.sampled_from([1, 4, 16]),
    batch_seqs=st.integers(7, 20),
    worlds=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    resume=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_ranks_see_an_epoch_once_in_one_order_and_resume_with_any_world_size(
    n_seqs: int,
    shard_seqs: int,
    batch_seqs: int,
    worlds: tuple[int, int],
    resume: float,
    seed: int,
) -> None:
    """Two worlds share the steps of three epochs; put together, it is the store, three times."""
    seqs = np.arange(3, 3 + n_seqs)
    assume(n_seqs >= batch_seqs)
    n_steps = -(-3 * n_seqs // batch_seqs)
    stop = round(resume * n_steps)
    seen: list[int] = []
    for world, steps in zip(worlds, (range(stop), range(stop, n_steps)), strict=True):
        ranks = [
            Sampler(seqs, shard_seqs, batch_seqs=batch_seqs, seed=seed, rank=rank, world=world)
            for rank in range(world)
        ]
        for step in steps:
            parts = [rank.batch(step).tolist() for rank in ranks]
            sizes = {len(part) for part in parts}
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1
            if step == stop:
                assert divmod(len(seen), n_seqs) == ranks[0].position(step)
            seen += [seq for part in parts for seq in part]
    assert len(seen) == n_steps * batch_seqs
    for epoch in range(3):
        order = sequence_order(seqs, shard_seqs, seed=seed, epoch=epoch).tolist()
        assert seen[epoch * n_seqs : (epoch + 1) * n_seqs] == order
        assert sorted(order) == seqs.tolist()


@pytest.mark.parametrize("window_seqs", [1, 10, 10_000])
def test_an_epoch_visits_everything_once(window_seqs: int) -> None:
    seqs = np.arange(5, 300)
    order = sequence_order(seqs, 8, seed=1, epoch=2, window_seqs=window_seqs)
    assert sorted(order.tolist()) == seqs.tolist()


def test_order_is_fixed_by_seed_and_epoch() -> None:
    """A literal: if it changes, stored runs would resume in another order."""
    seqs = np.arange(12)
    assert sequence_order(seqs, 4, seed=0, epoch=0).tolist() == FIXED
    others = [
        sequence_order(seqs, 4, seed=s, epoch=e).tolist() for s, e in ((0, 1), (1, 0), (1, 1))
    ]
    assert len({tuple(o) for o in [FIXED, *others]}) == 4


FIXED = [0, 1, 9, 6, 5, 10, 3, 7, 8, 11, 2, 4]


def test_a_window_mixes_whole_shards() -> None:
    seqs = np.arange(64)
    order = sequence_order(seqs, 8, seed=0, epoch=0, window_seqs=16)
    for first in range(0, 64, 16):
        assert len(set(order[first : first + 16] // 8)) == 2
    assert len(set(order[:8] // 8)) == 2


def test_epochs_follow_each_other_without_a_seam() -> None:
    """The sequences that did not fill a batch were once left out of their epoch."""
    sampler = Sampler(np.arange(10), 4, batch_seqs=3, seed=0)
    assert sampler.n_batches == 3
    stream = [seq for step in range(7) for seq in sampler.batch(step).tolist()]
    orders = [sequence_order(np.arange(10), 4, seed=0, epoch=e).tolist() for e in range(3)]
    assert stream == (orders[0] + orders[1] + orders[2])[:21]
    assert sampler.position(4) == (1, 2)
    assert sampler.batch(0).tolist() == Sampler(np.arange(10), 4, batch_seqs=3).batch(0).tolist()


@pytest.mark.parametrize("n_shards", [40, 65, 127])
def test_a_rest_of_shards_is_no_window_of_its_own(n_shards: int) -> None:
    """The last window once held what was left over: as little as one shard, mixed with nothing."""
    order = sequence_order(np.arange(n_shards * 8), 8, seed=0, epoch=0, window_seqs=256)
    n_windows = max(1, n_shards // 32)
    for window in range(n_windows):
        first, end = (-(-n_shards * w // n_windows) * 8 for w in (window, window + 1))
        assert end - first >= 256
        assert len(set(order[first:end] // 8)) == (end - first) // 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_seqs": 11}, "a batch is 11 sequences; only 10 are there"),
        ({"batch_seqs": 3, "world": 4}, "batch_seqs is 3; allowed: 4, the processes, or more"),
        ({"batch_seqs": 0}, "batch_seqs is 0"),
        ({"rank": 2, "world": 2, "batch_seqs": 2}, "rank is 2; allowed: 0..1"),
    ],
)
def test_impossible_batches_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(np.arange(10), 4, **({"batch_seqs": 2} | change))
