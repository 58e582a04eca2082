"""Which rank sees what, when."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lorsa.store import Sampler, sequence_order


@settings(max_examples=60, deadline=None)
@given(
    n_seqs=st.integers(8, 200),
    shard_seqs=st.sampled_from([1, 4, 16]),
    world=st.integers(1, 7),
    per_rank=st.integers(1, 3),
    start=st.integers(0, 40),
    seed=st.integers(0, 5),
)
def test_ranks_share_an_epoch_and_any_world_size_sees_the_same_batches(
    n_seqs: int, shard_seqs: int, world: int, per_rank: int, start: int, seed: int
) -> None:
    seqs = np.arange(3, 3 + n_seqs)
    batch_seqs = world * per_rank
    assume(n_seqs >= batch_seqs)
    alone = Sampler(seqs, shard_seqs, batch_seqs=batch_seqs, seed=seed)
    ranks = [
        Sampler(seqs, shard_seqs, batch_seqs=batch_seqs, seed=seed, rank=rank, world=world)
        for rank in range(world)
    ]
    together = np.concatenate([rank.batch(start) for rank in ranks])
    assert together.tolist() == alone.batch(start).tolist()
    assert {rank.n_batches for rank in ranks} == {n_seqs // batch_seqs}
    epoch = np.concatenate([alone.batch(step) for step in range(alone.n_batches)])
    assert len(set(epoch.tolist())) == len(epoch) == alone.n_batches * batch_seqs
    assert set(epoch.tolist()) <= set(seqs.tolist())


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


def test_epochs_follow_each_other() -> None:
    sampler = Sampler(np.arange(10), 4, batch_seqs=3, seed=0)
    assert sampler.n_batches == 3
    second = [s for step in (3, 4, 5) for s in sampler.batch(step).tolist()]
    expected = sequence_order(np.arange(10), 4, seed=0, epoch=1).tolist()[:9]
    assert second == expected
    assert sampler.batch(0).tolist() == Sampler(np.arange(10), 4, batch_seqs=3).batch(0).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_seqs": 11}, "a batch is 11 sequences; only 10 are there"),
        ({"batch_seqs": 3, "world": 2}, "multiple of the 2 processes"),
        ({"batch_seqs": 0}, "batch_seqs is 0"),
        ({"rank": 2, "world": 2, "batch_seqs": 2}, "rank is 2; allowed: 0..1"),
    ],
)
def test_impossible_batches_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(np.arange(10), 4, **({"batch_seqs": 2} | change))
