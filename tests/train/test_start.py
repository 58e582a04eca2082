"""From a store to a Lorsa that is ready to train."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import TrainError
from lorsa.sites import attention_ports
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.extent import extent
from lorsa.train.shape import shape_of
from lorsa.train.start import Initialiser, scales_of
from tiny import N_CTX


def _config(store: ActivationStore, **changes: Any) -> TrainConfig:
    settings = {"store": store.root, "layer": 1, "out": Path("o"), "top_k": 8} | changes
    return TrainConfig(**settings)


def test_the_shape_is_that_of_the_layer(store: ActivationStore) -> None:
    shape = shape_of(_config(store), store)
    assert (shape.d_model, shape.n_qk_heads, shape.d_qk_head, shape.n_ov_heads) == (32, 16, 8, 256)
    assert shape.scale == pytest.approx(8**-0.5)
    assert shape.rope is not None
    assert len(shape.rope.inv_freq) == 4
    assert shape.layer == 1
    assert shape.store_uuid == store.manifest.uuid


def test_expansion_rounds_up_to_whole_groups(store: ActivationStore) -> None:
    assert shape_of(_config(store, expansion=3.2), store).n_ov_heads == 112
    assert shape_of(_config(store, n_ov_heads=48), store).n_ov_heads == 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ov_heads": 50}, "n_ov_heads is 50, not a multiple of n_qk_heads 16; use 48 or 64"),
        ({"top_k": 300}, "top_k is 300; allowed: 1..256"),
        (
            {"n_qk_heads": 6},
            "n_qk_heads is 6; init 'layer' needs a multiple of the layer's 4 heads",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    store: ActivationStore, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        shape_of(_config(store, **change), store)


def test_a_layer_that_is_not_understood_needs_a_random_start(store: ActivationStore) -> None:
    store.manifest.modules["1.attention"]["self_check"]["passed"] = False
    with pytest.raises(TrainError, match="geometry is unknown .self-check failed.*--init random"):
        shape_of(_config(store), store)
    assert shape_of(_config(store, init="random"), store).n_ov_heads == 256


def test_scales_are_powers_of_two_near_sqrt_d_model(store: ActivationStore) -> None:
    config = _config(store)
    norms = map(store.mean_norm, config.ports.sites)
    for scale, norm in zip(scales_of(config, store), norms, strict=True):
        assert math.log2(scale).is_integer()
        assert 2**-0.5 <= scale * norm / 32**0.5 <= 2**0.5


def test_scales_of_other_kinds_do_not_follow_tokens_of_outlier_norm(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorsa, sae = _config(store), _config(store, kind="sae", site="attn_out")
    (site,) = sae.ports.sites
    assert store.median_norm(site) == store.norms(site, store.train_seqs).quantile(0.5)
    before = scales_of(lorsa, store), scales_of(sae, store)
    mean = store.mean_norm
    monkeypatch.setattr(store, "mean_norm", lambda site: 8 * mean(site))
    x, y = before[0]
    assert (scales_of(lorsa, store), scales_of(sae, store)) == ((x / 8, y / 8), before[1])


def test_a_run_is_cut_into_whole_steps(store: ActivationStore) -> None:
    n_train = len(store.train_seqs)
    span = extent(_config(store, batch_tokens=4 * N_CTX + 5), store, 1)
    assert (span.batch_seqs, span.step_tokens) == (4, 4 * N_CTX)
    assert span.n_steps == n_train // 4
    assert span.train_tokens == span.n_steps * span.step_tokens
    assert extent(_config(store, batch_tokens=4 * N_CTX), store, 2) == extent(
        _config(store, batch_tokens=4 * N_CTX), store, 1
    )
    long = extent(_config(store, train_tokens=100_000), store, 1)
    assert long.train_tokens <= 100_000 < long.train_tokens + long.step_tokens


def test_a_step_is_four_sequences_but_1024_tokens_at_least(store: ActivationStore) -> None:
    for n_ctx, expected in ((N_CTX, 1024), (256, 1024), (1024, 4096)):
        store.manifest = dataclasses.replace(store.manifest, n_ctx=n_ctx)
        assert extent(_config(store), store, 1).step_tokens == expected


def test_a_batch_larger_than_the_store_is_named(store: ActivationStore) -> None:
    with pytest.raises(TrainError, match=r"a step takes \d+; use --batch-tokens \d+ or less"):
        extent(_config(store, batch_tokens=10**6), store, 1)


def test_processes_that_cannot_share_a_step_are_named(store: ActivationStore) -> None:
    assert extent(_config(store, batch_tokens=4 * N_CTX), store, 3).batch_seqs == 4
    with pytest.raises(TrainError, match="4 sequences .* 5 processes; use --batch-tokens 160"):
        extent(_config(store, batch_tokens=4 * N_CTX), store, 5)


@pytest.mark.parametrize("init", ["layer", "random"])
def test_initialisation_is_seeded_and_unbiased(store: ActivationStore, init: str) -> None:
    def start(seed: int) -> Lorsa:
        config = _config(store, init=init, seed=seed)
        lorsa = Lorsa(shape_of(config, store))
        Initialiser(store).fill(lorsa, config)
        return lorsa

    first, again, other = start(0), start(0), start(1)
    assert torch.equal(first.W_V, again.W_V)
    assert not torch.equal(first.W_V, other.W_V)
    x, y = store.activations(attention_ports(1), store.train_seqs)
    with torch.no_grad():
        residual = (first(x) - y).square().sum() / (y - y.mean(dim=(0, 1))).square().sum()
    assert residual < 1


def test_init_from_layer_has_the_layers_pattern(store: ActivationStore) -> None:
    from lorsa.kernels.reference import attention_pattern
    from lorsa.language.attention import LayerWeights, queries_keys
    from lorsa.language.stored import layer_geometry

    config = _config(store)
    lorsa = Lorsa(shape_of(config, store))
    Initialiser(store).fill(lorsa, config)
    x = store.activations(attention_ports(1), [0, 1]).x
    geometry = layer_geometry(1, store)
    q, k = queries_keys(x, LayerWeights(**store.weights("1.attention")), geometry)
    k = k.repeat_interleave(geometry.n_heads // geometry.n_kv_heads, dim=2)
    pattern = attention_pattern(q, k, geometry).repeat_interleave(4, dim=1)
    assert torch.allclose(lorsa.pattern(x), pattern, atol=1e-4)
