"""Batches arrive in order, from any step, and errors arrive too."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lorsa.errors import StoreError
from lorsa.sites import Site, attention_ports
from lorsa.store.read.loader import PREFETCH_BATCHES, batches, held_out_batches
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.sampler import Sampler
from lorsa.store.write.writer import StoreWriter
from small import N_CTX, make_manifest, pair, values


def _sampler(store: ActivationStore) -> Sampler:
    return Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=3, seed=5)


@pytest.mark.parametrize("first_step", [0, 1, 6, 11])
def test_batches_are_those_of_the_sampler(make_store: Callable[..., Path], first_step: int) -> None:
    store = ActivationStore.open(make_store())
    sampler = _sampler(store)
    step = first_step
    for batch in batches(store, attention_ports(3), sampler, first_step=first_step, n_steps=12):
        seqs = sampler.batch(step)
        x, y = batch.stored.on("cpu")
        assert torch.equal(x, values(3, 0)[seqs])
        assert torch.equal(y, values(3, 1)[seqs])
        assert batch.wait_s >= 0
        step += 1
    assert step == 12


def test_a_damaged_shard_stops_the_batches(make_store: Callable[..., Path]) -> None:
    root = make_store()
    store = ActivationStore.open(root)
    path = root / "layers/3/attn_in/c/1/0/0"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(StoreError, match="damaged"):
        list(batches(store, attention_ports(3), _sampler(store), first_step=0, n_steps=6))


def test_batches_can_be_left_early(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store())
    for _ in batches(store, attention_ports(0), _sampler(store), first_step=0, n_steps=100):
        break


@pytest.mark.parametrize(("n_tokens", "n_seqs"), [(None, 2), (1, 1), (N_CTX, 1), (N_CTX + 1, 2)])
def test_held_out_batches_take_whole_sequences(
    make_store: Callable[..., Path], n_tokens: int | None, n_seqs: int
) -> None:
    store = ActivationStore.open(make_store())
    found = list(held_out_batches(store, attention_ports(0), batch_seqs=1, n_tokens=n_tokens))
    assert len(found) == n_seqs
    assert torch.equal(found[0].x, values(0, 0)[[20]])


def test_memory_is_used_again(make_store: Callable[..., Path]) -> None:
    """A ring: the batch in use, those read ahead meanwhile, and not a buffer more."""
    store = ActivationStore.open(make_store())
    places = {
        batch.stored.parts[Site(3, "attn_in")].values.data_ptr()
        for batch in batches(store, attention_ports(3), _sampler(store), first_step=0, n_steps=60)
    }
    assert len(places) == PREFETCH_BATCHES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_memory_is_flat_over_fifty_epochs(tmp_path: Path, compression: str) -> None:
    """A store of 8 MB, read 50 times: a leak of one batch in fifty would show.

    Fifty reads go before, as the allocators of a process with other tests behind it settle late.
    """
    n_seq, n_ctx, d_model = 64, 256, 64
    changes = {
        "n_seq": n_seq,
        "n_ctx": n_ctx,
        "d_model": d_model,
        "shard_seqs": 8,
        "layers": {0: {"weights": []}},
    }
    manifest = make_manifest(compression=compression, **changes)
    x = torch.randn(n_seq, n_ctx, d_model, generator=torch.Generator().manual_seed(0))
    root = tmp_path / "acts"
    ids = torch.zeros(n_seq, n_ctx, dtype=torch.int32)
    with StoreWriter.create(
        root, manifest, tokens=ids, documents=ids, document_names=["a"], modules={"0.attention": {}}
    ) as writer:
        for shard in range(manifest.n_shards):
            rows = manifest.shard_rows(shard)
            with writer.shard(shard) as session:
                part = x[rows.start : rows.stop]
                session.append(pair(0, part, part))
        writer.finish()
    store = ActivationStore.open(root)
    sampler = Sampler(np.arange(n_seq), 8, batch_seqs=8)
    sizes = []
    for epoch in range(100):
        steps = {"first_step": epoch * 8, "n_steps": epoch * 8 + 8}
        for batch in batches(store, attention_ports(0), sampler, **steps):
            assert batch.stored.parts[Site(0, "attn_in")].values[0, 0, 0].isfinite()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    assert max(sizes[50:]) - sizes[49] < 8  # MB; an epoch reads 8.4
