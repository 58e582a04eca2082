"""Shapes that cannot be, and the way through JSON."""

import json
from typing import Any

import pytest
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.language.geometry import (
    RARE,
    Alibi,
    AttentionGeometry,
    QKNorm,
    Rope,
    Stretch,
    read_qk_norm,
)

GOOD: dict[str, Any] = {
    "d_model": 8,
    "n_qk_heads": 2,
    "d_qk_head": 4,
    "n_ov_heads": 6,
    "top_k": 3,
    "scale": 0.5,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 7}, r"top_k is 7; allowed: 1..6 \(n_ov_heads\)"),
        ({"top_k": 0}, "top_k is 0"),
        ({"n_ov_heads": 7}, "n_ov_heads is 7, not a multiple of n_qk_heads 2; use 6 or 8"),
        ({"n_ov_heads": 1}, "use 2"),
        ({"d_model": 0}, "d_model is 0"),
        ({"select": "top"}, "allowed: relu, abs"),
        ({"activation": "relu"}, "activation is 'relu'; allowed: topk, batchtopk, jumprelu"),
        ({"max_l0": 4}, "max_l0 is 4; activation 'topk' lets top_k fire: leave it out"),
        ({"activation": "batchtopk", "max_l0": 2}, r"max_l0 is 2; allowed: 3..6 \(top_k..n_ov"),
        ({"activation": "jumprelu", "max_l0": 7}, "max_l0 is 7; allowed: 3..6"),
        (
            {"activation": "batchtopk", "select": "abs"},
            "select is 'abs'; activation 'batchtopk' goes with 'relu' only",
        ),
        ({"gate": "tanh"}, "gate is 'tanh'; allowed: sigmoid, softplus"),
        ({"alibi": Alibi(slopes=(0.5,))}, "alibi has 1 slopes; n_qk_heads is 2"),
        ({"rope": Rope(inv_freq=(1.0, 1.0, 1.0))}, "rope rotates 6 channels; d_qk_head is 4"),
    ],
)
def test_config_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LorsaConfig(**(GOOD | change))


def test_config_survives_json() -> None:
    rope = Rope(inv_freq=(1.0, 0.1), attention_scaling=1.2, interleaved=True)
    config = LorsaConfig(**GOOD, rope=rope, qk_norm=QKNorm(eps=1e-6), window=9, layer=3)
    assert LorsaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_most_heads_that_fire_is_a_number_of_the_config() -> None:
    config = LorsaConfig(**(GOOD | {"activation": "jumprelu", "n_ov_heads": 40}))
    assert config.max_l0 == config.n_slots == 12
    assert LorsaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LorsaConfig(**(GOOD | {"activation": "batchtopk"})).max_l0 == 6
    assert LorsaConfig(**GOOD).n_slots == 3


def test_a_config_of_before_there_were_activations_is_topk() -> None:
    older = LorsaConfig(**GOOD).to_dict()
    del older["activation"], older["max_l0"]
    assert LorsaConfig.from_dict(older) == LorsaConfig(**GOOD)


def test_a_norm_of_an_older_store_is_that_of_each_head() -> None:
    """Its kind was not written when there was one alone."""
    assert read_qk_norm({"eps": 1e-6}) == QKNorm(eps=1e-6, kind="rms")
    assert read_qk_norm({"eps": 1e-6, "kind": "rms_full"}) == QKNorm(eps=1e-6, kind="rms_full")
    with pytest.raises(
        ValueError, match="qk-norm is 'other'; allowed: rms, rms_by_head, rms_full, layer"
    ):
        read_qk_norm({"eps": 1e-6, "kind": "other"})


def test_geometry_survives_json() -> None:
    geometry = AttentionGeometry(
        d_model=8,
        n_heads=4,
        n_kv_heads=2,
        d_head=2,
        scale=0.7,
        rope=Rope(inv_freq=(0.3,)),
        softcap=5.0,
        qk_norm=QKNorm(eps=1e-6, kind="layer"),
    )
    again = AttentionGeometry.from_dict(json.loads(json.dumps(geometry.to_dict())))
    assert again == geometry


def test_a_name_may_have_spaces_of_any_script() -> None:
    assert LorsaConfig(**GOOD, base_model="/data/模型\u3000v1").base_model == "/data/模型\u3000v1"


def test_what_only_some_layers_have_is_written_where_it_is() -> None:
    """Earlier versions read the config of every other Lorsa."""
    config = LorsaConfig(**GOOD)
    assert not set(RARE) & set(config.to_dict())
    rare: dict[str, Any] = {
        "clip": 2.0,
        "chunk": 9,
        "stretch": Stretch(gain=0.1, every=8),
        "alibi": Alibi(slopes=(0.5, 0.25), scaled=True),
        "sinks": True,
        "gate": "sigmoid",
    }
    assert set(rare) == set(RARE)
    config = LorsaConfig(**GOOD, **rare)
    assert set(RARE) < set(config.to_dict())
    assert LorsaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
