"""Sizes before the model runs."""

import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from lorsa.errors import HarvestError
from lorsa.harvest.config import HarvestConfig, parse_bytes
from lorsa.harvest.plan import (
    MANY_FILE_BYTES,
    SHARD_BYTES,
    SHARD_FILE_BYTES,
    Sizes,
    n_arrays,
    shard_seqs,
)
from lorsa.sites import SITE_NAMES, Site, attention_ports
from lorsa.store.site_facts import SiteFacts

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
    assert sizes.cost.activation_bytes == 2 * 2 * 100 * 2  # x and y, two layers, bfloat16
    assert sizes.cost.token_bytes == sizes.cost.activation_bytes + 2 * 8 + 8
    assert (
        _sizes(tmp_path, dtype="float32").cost.activation_bytes == 2 * sizes.cost.activation_bytes
    )


def test_the_default_takes_half_of_the_disk_in_whole_sequences(tmp_path: Path, disk: Any) -> None:
    disk(1_000_000_000)
    sizes = _sizes(tmp_path)
    n_tokens = sizes.max_tokens()
    assert n_tokens % 64 == 0
    used = n_tokens * sizes.cost.token_bytes + sizes.cost.fixed_bytes
    assert 0.49e9 < used <= 0.5e9
    disk(10**15)
    assert _sizes(tmp_path).max_tokens() == 10_000_000


def test_a_disk_too_small_is_named_with_three_options_that_fit(tmp_path: Path, disk: Any) -> None:
    disk(100_000_000)
    with pytest.raises(HarvestError) as error:
        _sizes(tmp_path, layers=28, tokens=100_000).max_tokens()
    told = re.fullmatch(
        r"99,968 tokens of 28 layers take 1.15 GB; 100 MB are free; what fits: "
        r"--tokens ([\d_]+); or --dtype int8 --outputs derive --tokens ([\d_]+) \((.*) MB\); "
        r"or --layers 0-1 \((.*) MB\); or --force to try",
        str(error.value),
    )
    assert told is not None, error.value
    for settings in (
        {"layers": 28, "tokens": int(told[1])},
        {"layers": 28, "tokens": int(told[2]), "dtype": "int8", "outputs": "derive"},
        {"layers": 2, "tokens": 100_000},
    ):
        sizes = _sizes(tmp_path, **settings)
        assert sizes.max_tokens() == settings["tokens"] // 64 * 64
    assert _sizes(tmp_path, layers=28, tokens=100_000, force=True).max_tokens() == 99_968
    disk(1000)
    with pytest.raises(HarvestError, match=r"1 kB free on the disk is too little for two seq"):
        _sizes(tmp_path).max_tokens()
    with pytest.raises(HarvestError, match=r"are free; make room; or --force to try"):
        _sizes(tmp_path, tokens=1000).max_tokens()


def test_a_budget_limits_the_store(tmp_path: Path, disk: Any) -> None:
    disk(10**13)
    sizes = _sizes(tmp_path, budget="50 MB")
    used = sizes.cost.total(sizes.max_tokens())
    assert 0.99 * 50e6 < used <= 50e6
    assert sizes.default() is None
    assert _sizes(tmp_path, budget="50MB", tokens=640).max_tokens() == 640
    assert _sizes(tmp_path, budget="1TiB").max_tokens() > 10_000_000
    with pytest.raises(HarvestError, match="a budget of 1kB is too little"):
        _sizes(tmp_path, budget="1kB").max_tokens()
    for text, n_bytes in (("500GB", 500e9), ("1.5 TiB", 1.5 * 1024**4), ("12", 12), ("3k", 3000)):
        assert parse_bytes(text) == n_bytes
    for text in ("", "GB", "0", "5 bananas", "-1GB"):
        with pytest.raises(ValueError, match="budget is .*; give bytes such as 500GB"):
            HarvestConfig(model="m", budget=text)


def test_only_what_is_written_over_counts_as_free(tmp_path: Path, disk: Any) -> None:
    """Layers that stay were counted as room for those that are added."""
    disk(1_000_000)
    for layer in (0, 1, 7):
        file = tmp_path / f"acts/layers/{layer}/attn_in/c/0"
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(1000))
    config = HarvestConfig(model="m", store=tmp_path / "acts")
    layers = {0: "a", 1: "a"}
    there = [tmp_path / "acts/layers/0", tmp_path / "acts/layers/1"]
    assert Sizes(config, layers, 100, there=there).free_bytes == 1_002_000
    assert Sizes(config, layers, 100).free_bytes == 1_003_000
    assert Sizes(config, layers, 100, there=[tmp_path / "acts/layers/5"]).free_bytes == 1_000_000


def test_what_is_taken_unasked_is_said(tmp_path: Path, disk: Any) -> None:
    disk(1_000_000_000)
    assert "take half of the 1 GB that are free" in str(_sizes(tmp_path).default())
    disk(10**15)
    assert "10,000,000 tokens, the default" in str(_sizes(tmp_path).default())
    assert _sizes(tmp_path, tokens=1000).default() is None


def test_too_few_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(HarvestError, match="127 tokens do not make two sequences of 64"):
        _sizes(tmp_path, tokens=127).max_tokens()


def test_shards_are_as_large_as_they_may_be() -> None:
    assert shard_seqs(1536, seq_bytes=294_912, n_arrays=2) == 64  # twenty shards
    assert shard_seqs(10**6, seq_bytes=1 << 21, n_arrays=2) == 256  # 512 MB a file
    assert shard_seqs(10**6, seq_bytes=1 << 21, n_arrays=64) == 64  # 8 GB a shard
    assert shard_seqs(10**6, seq_bytes=1 << 21, n_arrays=128) == 32  # and 64 MB a file


def test_many_arrays_do_not_make_many_small_files() -> None:
    """Of 80 layers with three arrays, a shard was two sequences, and a store a million files."""
    assert shard_seqs(10**6, seq_bytes=1 << 24, n_arrays=240) == 4  # 64 MB a file
    assert shard_seqs(10**6, seq_bytes=1 << 24, n_arrays=10_000) == 4
    assert shard_seqs(10**6, seq_bytes=1 << 30, n_arrays=240) == 1


def test_more_sites_do_not_make_a_shard_shorter() -> None:
    """A shard spans all arrays: seven sites of eighty layers made it a sequence or two."""
    attention = {site: SiteFacts(8) for n in range(80) for site in attention_ports(n).sites}
    every = {Site(n, name): SiteFacts(8) for n in range(80) for name in SITE_NAMES}
    derived = {site: SiteFacts(8, None) for site in attention if site.name == "attn_in"}
    assert (n_arrays(attention), n_arrays(every), n_arrays(derived)) == (160, 160, 80)


@pytest.mark.parametrize("n_seq", [2, 19, 40, 1536, 10**6])
@pytest.mark.parametrize("seq_bytes", [1, 294_912, 1 << 28])
@pytest.mark.parametrize("n_arrays", [2, 160])
def test_shards_are_powers_of_two_within_limits(n_seq: int, seq_bytes: int, n_arrays: int) -> None:
    found = shard_seqs(n_seq, seq_bytes=seq_bytes, n_arrays=n_arrays)
    assert found >= 1
    assert found & (found - 1) == 0
    if found > 1:
        assert found * seq_bytes <= SHARD_FILE_BYTES
        assert found * seq_bytes <= max(MANY_FILE_BYTES, SHARD_BYTES // n_arrays)
        assert n_seq // found >= 20
