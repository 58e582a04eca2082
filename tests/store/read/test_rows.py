"""Any rows of one array, from many threads, with few files open."""

import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from lorsa.errors import StoreError
from lorsa.store import open_files
from lorsa.store.read.reader import ActivationStore
from small import N_SEQ, values

ARRAY = "layers/3/attn_in"


def _n_open() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_few_files_are_kept_open_and_none_for_ever(
    make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "OPEN_FILES", 2)
    root = make_store()
    before = _n_open()
    store = ActivationStore.open(root)
    for seq in range(N_SEQ):
        assert torch.equal(store.read(ARRAY, [seq])[0], values(3, 0)[seq])
    assert _n_open() <= before + 2
    del store
    assert _n_open() == before


def test_too_many_open_files_are_no_damage(make_store: Callable[..., Path]) -> None:
    """The message said that the store had to be verified and harvested again."""
    store = ActivationStore.open(make_store())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    unused = os.open(".", os.O_RDONLY)
    os.close(unused)
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"Too many open files.*ulimit -n") as raised:
            store.read(ARRAY, [0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "verify" not in str(raised.value)
    assert torch.equal(store.read(ARRAY, [0])[0], values(3, 0)[0])


def test_the_arrays_of_a_store_share_the_files_that_are_open(
    make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "OPEN_FILES", 2)
    store = ActivationStore.open(make_store())
    before = _n_open()
    for name in ("tokens", ARRAY, "layers/0/attn_in", "layers/3/attn_out", "layers/3/attn_in_norm"):
        store.read(name, range(N_SEQ))
    assert _n_open() <= before + 2


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_many_threads_read_what_one_does(
    make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setattr(open_files, "OPEN_FILES", 1)
    reader = ActivationStore.open(make_store(compression=compression)).reader(ARRAY)
    generator = np.random.default_rng(0)
    choices = [generator.integers(0, N_SEQ, 5) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for seqs, found in zip(choices, pool.map(reader.read, choices), strict=True):
            assert torch.equal(found, values(3, 0)[seqs])


def test_damage_is_found_in_a_file_that_is_open(make_store: Callable[..., Path]) -> None:
    root = make_store()
    reader = ActivationStore.open(root).reader(ARRAY)
    reader.read([0])
    path = root / f"{ARRAY}/c/0/0/0"
    with path.open("r+b") as file:
        file.seek(5)
        file.write(b"\xff")
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        reader.read([0])
    with path.open("r+b") as file:
        file.truncate(50)
    with pytest.raises(StoreError, match=f"{path} ends before byte"):
        reader.read([0])


def test_a_file_that_went_away_is_named(make_store: Callable[..., Path]) -> None:
    root = make_store()
    store = ActivationStore.open(root)
    (root / f"{ARRAY}/c/1/0/0").unlink()
    with pytest.raises(StoreError, match=r"attn_in/c/1/0/0 cannot be read"):
        store.read(ARRAY, [4])


def test_a_read_that_stops_short_goes_on(
    make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network disks: at most 7 bytes a call, whatever was asked for."""
    preadv = os.preadv

    def short(handle: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(handle, [buffers[0][:7]], offset)

    store = ActivationStore.open(make_store())
    monkeypatch.setattr(os, "preadv", short)
    assert torch.equal(store.read(ARRAY, range(N_SEQ)), values(3, 0))
