"""Checkpoints of Llamascopium give what its equations say, and come back as they went."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from lorsa.model import CheckpointError, Lorsa, LorsaConfig, QKNorm, Rope, llamascopium
from safetensors.torch import load_file, save_file
from torch import Tensor

NTK = {
    "use_NTK_by_parts_rope": True,
    "NTK_by_parts_factor": 8.0,
    "NTK_by_parts_low_freq_factor": 1.0,
    "NTK_by_parts_high_freq_factor": 4.0,
    "old_context_len": 64,
    "rotary_base": 500000,
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{rule}-{'norm' if norm else 'plain'}-{'adjacent' if pairs else 'halves'}-{n_qk}": {
        "act_fn": rule,
        "use_post_qk_ln": norm,
        "normalization_type": "RMS" if norm else None,
        "rotary_adjacent_pairs": pairs,
        "n_qk_heads": n_qk,
    }
    for rule, norm, pairs, n_qk in product(
        ("topk", "batchtopk", "jumprelu"), (False, True), (True, False), (6, 24)
    )
} | {
    "relu": {"act_fn": "relu"},
    "score-without-norm": {"sparsity_include_decoder_norm": False},
    "jumprelu-score-without-norm": {
        "sparsity_include_decoder_norm": False,
        "act_fn": "jumprelu",
    },
    "batchtopk-score-without-norm": {
        "sparsity_include_decoder_norm": False,
        "act_fn": "batchtopk",
    },
    "folded": {"norm_activation": "inference"},
    "no-decoder-bias": {"use_decoder_bias": False},
    "other-scale": {"attn_scale": 1.7},
    "partial-rotary": {"rotary_dim": 4, "rotary_adjacent_pairs": False},
    "no-rotary": {"positional_embedding_type": "none"},
    "ntk-by-parts": NTK,
    "uneven-width": {"expansion_factor": 36 / 12, "n_qk_heads": 9},
}


def _dense(lorsa: Lorsa, x: Tensor) -> foreign.Result:
    acts, ids = lorsa.encode(x)
    wide = acts.new_zeros(*x.shape[:2], lorsa.config.n_ov_heads)
    return foreign.Result(wide.scatter_add(2, ids.long(), acts), lorsa.decode(acts, ids))


def _x(config: dict[str, Any]) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randn(3, 10, config["d_model"], generator=random)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_it_computes_what_the_equations_say(name: str, tmp_path: Path) -> None:
    config = foreign.settings(**VARIANTS[name])
    weights = foreign.tensors(config)
    lorsa = Lorsa.from_pretrained(foreign.write(tmp_path, config, weights))
    x = _x(config)
    expected, found = foreign.compute(x, config, weights), _dense(lorsa, x)
    assert (expected.acts != 0).any()
    assert torch.equal(expected.acts != 0, found.acts != 0)
    torch.testing.assert_close(found.acts.double(), expected.acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.y_hat.double(), expected.y_hat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_what_was_read_and_written_says_the_same(name: str, tmp_path: Path) -> None:
    config = foreign.settings(**VARIANTS[name])
    weights = foreign.tensors(config)
    lorsa = Lorsa.from_pretrained(foreign.write(tmp_path / "theirs", config, weights))
    llamascopium.write(lorsa, tmp_path / "again")
    again = Lorsa.from_pretrained(tmp_path / "again")
    assert again.config == lorsa.config
    _require_equal(again, lorsa)
    written = load_file(tmp_path / "again" / "sae_weights.safetensors")
    x = _x(config)
    theirs = json.loads((tmp_path / "again" / "config.json").read_text())
    expected = foreign.compute(x, foreign.settings(**theirs), written)
    torch.testing.assert_close(
        _dense(lorsa, x).y_hat.double(), expected.y_hat, atol=1e-5, rtol=1e-5
    )


OURS = LorsaConfig(
    d_model=12,
    n_qk_heads=6,
    d_qk_head=8,
    n_ov_heads=24,
    top_k=5,
    scale=0.3,
    rope=Rope(inv_freq=tuple(10000 ** (-j / 4) for j in range(4))),
    n_ctx=16,
    base_model="owner/model",
    base_revision="abc",
    layer=3,
    store_uuid="5e",
)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("norm", [None, "rms", "rms_by_head"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n_qk_heads", [6, 24])
@torch.no_grad()
def test_what_was_written_is_read_to_the_bit(
    activation: str, norm: str | None, interleaved: bool, n_qk_heads: int, tmp_path: Path
) -> None:
    assert OURS.rope is not None
    lorsa = _random(
        activation=activation,
        max_l0=None if activation == "topk" else 9,
        qk_norm=None if norm is None else QKNorm(eps=1e-5, kind=norm),
        rope=Rope(inv_freq=OURS.rope.inv_freq, interleaved=interleaved),
        n_qk_heads=n_qk_heads,
    )
    llamascopium.write(lorsa, tmp_path)
    again = Lorsa.from_pretrained(tmp_path)
    assert again.config == lorsa.config
    _require_equal(again, lorsa)


def _random(**changes: Any) -> Lorsa:
    lorsa = Lorsa(LorsaConfig(**{**_fields(OURS), **changes}))
    torch.manual_seed(0)
    for parameter in lorsa.parameters():
        parameter.normal_()
    if lorsa.threshold is not None:
        lorsa.threshold.fill_(0.37)
    return lorsa


def _fields(config: LorsaConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _require_equal(one: Lorsa, other: Lorsa) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"select": "abs"}, "select"),
        ({"softcap": 30.0}, "softcap"),
        ({"window": 4}, "window"),
        ({"qk_norm": QKNorm(eps=1e-5, kind="rms_full")}, "rms_full"),
        ({"qk_norm": QKNorm(eps=1e-5, kind="layer")}, "layer"),
        ({"rope": Rope(inv_freq=(1.0, 0.5, 0.3, 0.29))}, "rope"),
        ({"rope": Rope(inv_freq=(0.9, 0.5, 0.3, 0.2))}, "rope"),
    ],
)
def test_what_they_cannot_express_is_named(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    lorsa = Lorsa(LorsaConfig(**{**_fields(OURS), **changes}))
    with pytest.raises(CheckpointError, match=named):
        llamascopium.write(lorsa, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_scaled_rotations_become_part_of_the_attention_scale(tmp_path: Path) -> None:
    assert OURS.rope is not None
    rope = Rope(inv_freq=OURS.rope.inv_freq, attention_scaling=1.2)
    lorsa = _random(rope=rope)
    llamascopium.write(lorsa, tmp_path)
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(Lorsa.from_pretrained(tmp_path)(x), lorsa(x))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'"),
        ({"act_fn": "layertopk"}, "act_fn is 'layertopk'"),
        ({"rotary_scale": 2}, "rotary_scale is 2"),
        ({"positional_embedding_type": "alibi"}, "positional_embedding_type is 'alibi'"),
        ({"rotary_dim": 10}, "rotary_dim is 10"),
        ({"rotary_dim": 3}, "rotary_dim is 3"),
        ({"top_k": "five"}, "top_k is 'five'; int is meant"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": 0}, "top_k is 0"),
        ({"attn_scale": float("inf")}, "attn_scale is inf"),
        ({"attn_scale": 0.0}, "attn_scale is 0"),
        ({"n_qk_heads": 7}, "n_ov_heads is 24, not a multiple of n_qk_heads 7"),
        ({"d_model": None}, "has no d_model"),
        ({"use_smolgen": True}, "use_smolgen = True"),
        ({"softcap": 30.0}, "softcap = 30.0"),
    ],
)
def test_settings_that_are_not_ours_are_named(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    weights = foreign.tensors(foreign.settings())
    foreign.write(tmp_path, foreign.settings(**changes), weights)
    with pytest.raises(CheckpointError, match=named) as caught:
        Lorsa.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    config = foreign.settings()
    weights = foreign.tensors(config)
    weights["W_V"] = weights["W_V"][:, :-1].contiguous()
    weights["smolgen.w"] = torch.zeros(2)
    del weights["b_K"]
    with pytest.raises(CheckpointError) as caught:
        Lorsa.from_pretrained(foreign.write(tmp_path, config, weights))
    for part in (
        r"W_V is [24, 11], expected [24, 12]",
        "b_K is missing",
        "smolgen.w is unknown",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), None])
def test_a_norm_that_was_never_measured_is_named(norm: float | None, tmp_path: Path) -> None:
    config = foreign.settings()
    weights = foreign.tensors(config)
    name = f"dataset_average_activation_norm.{foreign.HOOK_IN}"
    if norm is None:
        del weights[name]
    else:
        weights[name] = torch.tensor(norm)
    with pytest.raises(CheckpointError, match="mean norm above 0 is meant"):
        Lorsa.from_pretrained(foreign.write(tmp_path, config, weights))


@torch.no_grad()
def test_fewer_qk_heads_in_the_file_are_repeated(tmp_path: Path) -> None:
    few, many = (foreign.settings(n_qk_heads=n) for n in (6, 12))
    weights = foreign.tensors(few)
    lorsa = Lorsa.from_pretrained(foreign.write(tmp_path, many, weights))
    for name in ("W_Q", "W_K", "b_Q", "b_K"):
        weights[name] = weights[name].repeat_interleave(2, dim=0)
    x = _x(many)
    expected = foreign.compute(x, many, weights).y_hat
    torch.testing.assert_close(lorsa(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sae_weights.pt", "checkpoints/final.safetensors"])
@torch.no_grad()
def test_other_places_of_the_weights_are_read(name: str, tmp_path: Path) -> None:
    config = foreign.settings()
    weights = foreign.tensors(config)
    usual = Lorsa.from_pretrained(foreign.write(tmp_path / "usual", config, weights))
    folder = tmp_path / "other"
    (folder / name).parent.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".pt"):
        torch.save({"sae": weights, "version": "2.0.0b34"}, folder / name)
    else:
        save_file(weights, folder / name)
    _require_equal(Lorsa.from_pretrained(folder), usual)


def test_a_distributed_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "sae_weights.dcp").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(foreign.settings()))
    with pytest.raises(CheckpointError, match=r"distributed checkpoint \(.dcp\)"):
        Lorsa.from_pretrained(tmp_path)


def test_a_path_in_the_config_is_not_followed(tmp_path: Path) -> None:
    config = foreign.settings()
    weights = foreign.tensors(config)
    outside = foreign.write(tmp_path / "outside", config, weights)
    folder = tmp_path / "inside"
    folder.mkdir()
    hooks = {
        "sae_pretrained_name_or_path": str(outside),
        "hook_point_in": str(outside / "sae_weights.safetensors"),
        "hook_point_out": "../outside/sae_weights.safetensors",
    }
    (folder / "config.json").write_text(json.dumps({**config, **hooks}))
    with pytest.raises(CheckpointError, match=r"inside/sae_weights.safetensors is missing"):
        Lorsa.from_pretrained(folder)


@torch.no_grad()
def test_a_threshold_set_later_takes_the_place_of_the_mean(tmp_path: Path) -> None:
    config = foreign.settings(act_fn="batchtopk")
    lorsa = Lorsa.from_pretrained(foreign.write(tmp_path, config, foreign.tensors(config)))
    assert not lorsa.config.has_threshold
    x = _x(config)
    one_by_one = torch.cat([lorsa.encode(part).acts for part in x.split(1)])
    assert not torch.equal(one_by_one, lorsa.encode(x).acts)  # the batch decides
    lorsa.set_threshold(x)
    assert lorsa.config.has_threshold
    one_by_one = torch.cat([lorsa.encode(part).acts for part in x.split(1)])
    torch.testing.assert_close(one_by_one, lorsa.encode(x).acts)
    lorsa.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(Lorsa.from_pretrained(tmp_path / "saved")(x), lorsa(x))


@pytest.mark.parametrize(
    ("inv_freq_of", "exact"),
    [
        (lambda: _llama3(64, 500000.0, 8192), True),
        (lambda: _llama3(64, 500000.0, 16), True),
        (lambda: tuple(1e6 ** (-j / 64) for j in range(64)), True),
        (lambda: tuple(100000 ** (-j / 32) for j in range(32)), True),
        (lambda: tuple(10007 ** (-j / 32) for j in range(32)), True),
        (lambda: tuple(10000 ** (-j / 32) / 4 for j in range(32)), True),
        (lambda: tuple(1.0 / (j + 1) for j in range(8)), False),
    ],
)
def test_frequencies_become_settings(inv_freq_of: Any, exact: bool) -> None:
    from lorsa.model.foreign import Settings
    from lorsa.model.rotary_settings import spell_rope, take_rope

    rope = Rope(inv_freq=inv_freq_of())
    spelt = spell_rope(rope)
    assert (spelt is not None) == exact
    if spelt is not None:
        width = 2 * len(rope.inv_freq)
        again = take_rope(Settings(Path("x"), spelt), d_qk_head=width, adjacent=True)
        assert again is not None
        torch.testing.assert_close(
            torch.tensor(again.inv_freq), torch.tensor(rope.inv_freq), rtol=1e-5, atol=0
        )


def _llama3(n: int, base: float, old: int) -> tuple[float, ...]:
    config = {
        "NTK_by_parts_low_freq_factor": 1.0,
        "NTK_by_parts_high_freq_factor": 4.0,
        "NTK_by_parts_factor": 8.0,
        "old_context_len": old,
    }
    return tuple(foreign.slowed(base ** (-j / n), config) for j in range(n))
