"""What is held out."""

import pytest
from lorsa.store.manifest import held_out_shards


@pytest.mark.parametrize(
    ("n_seq", "shard_seqs", "n_held_out"),
    [
        (1536, 64, 64),
        (1281, 64, 65),
        (781, 32, 45),
        (100, 5, 5),
        (20, 1, 1),
        (3, 1, 1),
        (2, 1, 1),
        (100_000, 64, 4992 + 32),
    ],
)
def test_about_five_percent_of_the_sequences_are_held_out(
    n_seq: int, shard_seqs: int, n_held_out: int
) -> None:
    """Five per cent of the shards was once a single sequence, where the last shard was short."""
    shards = held_out_shards(n_seq, shard_seqs)
    n_shards = -(-n_seq // shard_seqs)
    assert list(shards) == list(range(shards[0], n_shards))
    assert n_seq - shards[0] * shard_seqs == pytest.approx(n_held_out, abs=shard_seqs // 2)
