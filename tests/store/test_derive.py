"""Stores that keep x alone: y is made of it by whoever reads."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.errors import StoreError
from lorsa.sites import Site, attention_ports
from lorsa.store.read.derived import LEAST_LIMIT, KnownNorms, norm_limit
from lorsa.store.read.loader import batches, held_out_batches
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.sampler import Sampler
from lorsa.store.read.stored import Derive
from small import LAYERS, N_SEQ, make_manifest, values

X, Y = attention_ports(3).sites


def _by(change: Callable[[torch.Tensor], torch.Tensor]) -> Derive:
    """Return what derives layer 3's y from its x by a function."""

    def derive(stored: Mapping[Site, torch.Tensor], wanted: Sequence[Site]) -> Any:
        assert (list(stored), list(wanted)) == ([X], [Y])
        return {Y: change(stored[X])}

    return derive


_double = _by(lambda x: 2 * x)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_y_is_derived_when_it_is_read(
    make_store: Callable[..., Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KnownNorms, "require", lambda self, y: None)
    store = ActivationStore.open(make_store(outputs="derive", dtype=dtype))
    assert not (store.root / "layers/3/attn_out").exists()
    x, y = store.activations(attention_ports(3), [4, 1], _double)
    assert torch.equal(x, store.values(Site(3, "attn_in"), [4, 1]))
    assert torch.equal(y, 2 * x)
    assert torch.equal(
        next(held_out_batches(store, attention_ports(3), batch_seqs=2, derive=_double)).y[0],
        (2 * store.values(Site(3, "attn_in"), [20])[0]),
    )
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=3)
    for step, batch in enumerate(
        batches(store, attention_ports(3), sampler, first_step=0, n_steps=7)
    ):
        x, y = batch.stored.on("cpu", _double)
        assert torch.equal(x, store.values(Site(3, "attn_in"), sampler.batch(step)))
        assert torch.equal(y, 2 * x)


def test_nobody_takes_a_derived_y_for_a_stored_one(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store(outputs="derive"))
    with pytest.raises(StoreError, match="does not store 3.attn_out, which is derived"):
        store.activations(attention_ports(3), [0])
    with pytest.raises(ValueError, match="nothing was given to derive it"):
        next(held_out_batches(store, attention_ports(3), batch_seqs=2))


def test_norms_of_y_are_known_all_the_same(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store(outputs="derive"))
    for layer in LAYERS:
        x, y = (values(layer, site)[store.train_seqs].norm(dim=-1) for site in (0, 1))
        assert store.mean_norm(Site(layer, "attn_in")) == pytest.approx(float(x.mean()), rel=1e-6)
        assert store.mean_norm(Site(layer, "attn_out")) == pytest.approx(float(y.mean()), rel=1e-6)
        norms = store.norms(Site(layer, "attn_out"), range(N_SEQ))
        assert torch.allclose(norms, values(layer, 1).norm(dim=-1))


def _known(seqs: list[int], scale: float = 1.0) -> Derive:
    """Return what derives the small store's own y of some sequences, larger by a factor."""
    return _by(lambda x: scale * values(3, 1)[seqs])


def test_a_derived_y_has_the_norms_that_the_harvest_kept(make_store: Callable[..., Path]) -> None:
    """Wrong weights or a wrong geometry gave another y without a word, though ||y|| was there."""
    store = ActivationStore.open(make_store(outputs="derive"))
    seqs = [4, 1]
    assert torch.equal(
        store.activations(attention_ports(3), seqs, _known(seqs)).y, values(3, 1)[seqs]
    )
    rotated = values(3, 1)[seqs].roll(1, dims=-1)
    assert (
        store.activations(attention_ports(3), seqs, _by(lambda x: rotated)).y is rotated
    )  # norms are all that is kept
    with pytest.raises(StoreError, match=r"3.attn_out: what is derived .* by 0.002 in its norm"):
        store.activations(attention_ports(3), seqs, _known(seqs, 1.002))
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=3)
    for batch in batches(store, attention_ports(3), sampler, first_step=0, n_steps=2):
        mine = [int(seq) for seq in batch.seqs]
        batch.stored.on("cpu", _known(mine))
        with pytest.raises(StoreError, match="in its norm"):
            batch.stored.on("cpu", _known(mine, 0.9))
        with pytest.raises(StoreError, match="by nan in its norm"):
            batch.stored.on("cpu", _known(mine, float("nan")))
    with pytest.raises(StoreError, match="in its norm"):
        next(
            held_out_batches(store, attention_ports(3), batch_seqs=2, derive=_known([20, 21], 2.0))
        )


def test_one_wrong_token_is_found(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store(outputs="derive"))
    seqs = list(range(N_SEQ))
    y = values(3, 1)
    y[11, 5] *= 1.1
    with pytest.raises(StoreError, match="in its norm"):
        store.activations(attention_ports(3), seqs, _by(lambda x: y))


def test_norms_may_differ_by_what_x_was_rounded_to() -> None:
    """Limits grow with the dtype and with what the model's own precision costs."""

    def limit(**facts: Any) -> float:
        return norm_limit(make_manifest(outputs="derive", **facts), Y)

    limits = [limit(dtype=dtype) for dtype in ("float32", "float16", "bfloat16")]
    assert limits[0] == LEAST_LIMIT == 1e-3
    assert limits == sorted(limits)
    assert limits[-1] < limit(dtype="int8") < 0.1
    for noise, more in ((0.01, 0.04), (None, 0.0), ("x", 0.0), (float("inf"), 0.0)):
        facts = {3: {"weights": [], "self_check": {"noise": noise}}}
        assert limit(layers=facts) == pytest.approx(1e-3 + more)
