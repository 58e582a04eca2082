"""Stores that keep x alone: y is made of it by whoever reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorsa.errors import StoreError
from lorsa.store.read.loader import batches, held_out_batches
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.sampler import Sampler
from small import LAYERS, N_SEQ, values


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_y_is_derived_when_it_is_read(make_store: Callable[..., Path], dtype: str) -> None:
    store = ActivationStore.open(make_store(outputs="derive", dtype=dtype))
    assert not (store.root / "layers/3/attn_out").exists()
    x, y = store.activations(3, [4, 1], _double)
    assert torch.equal(x, store.inputs(3, [4, 1]))
    assert torch.equal(y, 2 * x)
    assert torch.equal(
        next(held_out_batches(store, 3, batch_seqs=2, derive=_double)).y[0],
        (2 * store.inputs(3, [20])[0]),
    )
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=3)
    for step, batch in enumerate(batches(store, 3, sampler, first_step=0, n_steps=7)):
        x, y = batch.stored.on("cpu", _double)
        assert torch.equal(x, store.inputs(3, sampler.batch(step)))
        assert torch.equal(y, 2 * x)


def test_nobody_takes_a_derived_y_for_a_stored_one(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store(outputs="derive"))
    with pytest.raises(StoreError, match=r"has no y \(outputs: derive\)"):
        store.activations(3, [0])
    with pytest.raises(ValueError, match="nothing was given to derive it"):
        next(held_out_batches(store, 3, batch_seqs=2))


def test_norms_of_y_are_known_all_the_same(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store(outputs="derive"))
    for layer in LAYERS:
        x, y = (values(layer, site)[store.train_seqs].norm(dim=-1) for site in (0, 1))
        assert store.mean_norms(layer).x == pytest.approx(float(x.mean()), rel=1e-6)
        assert store.mean_norms(layer).y == pytest.approx(float(y.mean()), rel=1e-6)
        norms = store.norms(layer, range(N_SEQ))
        assert torch.allclose(norms[..., 1], values(layer, 1).norm(dim=-1))
