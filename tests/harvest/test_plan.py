"""Sizes before the model runs."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from lorsa.harvest import HarvestConfig, HarvestError
from lorsa.harvest.plan import SHARD_BYTES, SHARD_FILE_BYTES, Sizes, shard_seqs

Usage = namedtuple("Usage", "total used free")


def _sizes(tmp_path: Path, layers: int = 2, **settings: Any) -> Sizes:
    config = HarvestConfig(model="m", store=tmp_path / "acts", **{"n_ctx": 64, **settings})
    return Sizes(config, dict.fromkeys(range(layers), "attention"), d_model=100)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the free bytes of the disk."""

    def free(n_bytes: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, n_bytes))

    return free


def test_bytes_of_a_token(tmp_path: Path) -> None:
    sizes = _sizes(tmp_path)
    assert sizes.activation_bytes == 2 * 2 * 100 * 2  # x and y, two layers, bfloat16
    assert sizes.token_bytes == sizes.activation_bytes + 2 * 8 + 8
    assert _sizes(tmp_path, dtype="float32").activation_bytes == 2 * sizes.activation_bytes


def test_the_default_takes_half_of_the_disk_in_whole_sequences(tmp_path: Path, disk: Any) -> None:
    disk(1_000_000_000)
    sizes = _sizes(tmp_path)
    n_tokens = sizes.max_tokens()
    assert n_tokens % 64 == 0
    used = n_tokens * sizes.token_bytes + sizes.weight_bytes
    assert 0.49e9 < used <= 0.5e9
    disk(10**15)
    assert _sizes(tmp_path).max_tokens() == 10_000_000


def test_a_disk_too_small_is_named_with_what_fits(tmp_path: Path, disk: Any) -> None:
    disk(100_000_000)
    with pytest.raises(HarvestError, match=r"824 MB; 100 MB are free: use --tokens [\d_]+, fewer"):
        _sizes(tmp_path, tokens=1_000_000).max_tokens()
    forced = _sizes(tmp_path, tokens=1_000_000, force=True)
    assert forced.max_tokens() == 1_000_000 // 64 * 64
    disk(1000)
    with pytest.raises(HarvestError, match=r"are too few for a store of 2 layers; make room"):
        _sizes(tmp_path).max_tokens()


def test_too_few_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(HarvestError, match="127 tokens do not make two sequences of 64"):
        _sizes(tmp_path, tokens=127).max_tokens()


def test_shards_are_as_large_as_they_may_be() -> None:
    assert shard_seqs(1536, seq_bytes=294_912, n_arrays=2) == 64  # twenty shards
    assert shard_seqs(10**6, seq_bytes=1 << 21, n_arrays=2) == 256  # 512 MB a file
    assert shard_seqs(10**6, seq_bytes=1 << 21, n_arrays=64) == 64  # 8 GB a shard


@pytest.mark.parametrize("n_seq", [2, 19, 40, 1536, 10**6])
@pytest.mark.parametrize("seq_bytes", [1, 294_912, 1 << 28])
@pytest.mark.parametrize("n_arrays", [2, 160])
def test_shards_are_powers_of_two_within_limits(n_seq: int, seq_bytes: int, n_arrays: int) -> None:
    found = shard_seqs(n_seq, seq_bytes=seq_bytes, n_arrays=n_arrays)
    assert found >= 1
    assert found & (found - 1) == 0
    if found > 1:
        assert found * seq_bytes <= SHARD_FILE_BYTES
        assert found * seq_bytes * n_arrays <= SHARD_BYTES
        assert n_seq // found >= 20
