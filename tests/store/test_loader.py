"""Batches arrive in order, from any step, and errors arrive too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorsa.store import ActivationStore, Sampler, StoreError, batches, held_out_batches
from small import N_CTX, values


def _sampler(store: ActivationStore) -> Sampler:
    return Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=3, seed=5)


@pytest.mark.parametrize("first_step", [0, 1, 6, 11])
def test_batches_are_those_of_the_sampler(make_store: Callable[..., Path], first_step: int) -> None:
    store = ActivationStore.open(make_store())
    sampler = _sampler(store)
    step = first_step
    for batch in batches(store, 3, sampler, first_step=first_step, n_steps=12):
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
        list(batches(store, 3, _sampler(store), first_step=0, n_steps=6))


def test_batches_can_be_left_early(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store())
    for _ in batches(store, 0, _sampler(store), first_step=0, n_steps=100):
        break


@pytest.mark.parametrize(("n_tokens", "n_seqs"), [(None, 2), (1, 1), (N_CTX, 1), (N_CTX + 1, 2)])
def test_held_out_batches_take_whole_sequences(
    make_store: Callable[..., Path], n_tokens: int | None, n_seqs: int
) -> None:
    store = ActivationStore.open(make_store())
    found = list(held_out_batches(store, 0, batch_seqs=1, n_tokens=n_tokens))
    assert len(found) == n_seqs
    assert torch.equal(found[0].x, values(0, 0)[[20]])
