"""Checkpoints of Llamascopium give what its equations say, and come back as they went."""

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import foreign
import pytest
import torch
from lorsa.dictionaries.formats import llamascopium_write
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import CheckpointError
from lorsa.language.geometry import QKNorm, Rope
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
    llamascopium_write.write(lorsa.saved(), tmp_path / "again")
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
    llamascopium_write.write(lorsa.saved(), tmp_path)
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
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


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
        llamascopium_write.write(lorsa.saved(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_long_context_is_cut_in_their_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamascopium_write, "MOST_CTX", 24)
    lorsa = _random(n_ctx=1_000_000)
    llamascopium_write.write(lorsa.saved(), tmp_path)
    assert load_file(tmp_path / "sae_weights.safetensors")["mask"].shape == (24, 24)
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == 24
    assert Lorsa.from_pretrained(tmp_path).config == lorsa.config


@torch.no_grad()
def test_scaled_rotations_become_part_of_the_attention_scale(tmp_path: Path) -> None:
    assert OURS.rope is not None
    rope = Rope(inv_freq=OURS.rope.inv_freq, attention_scaling=1.2)
    lorsa = _random(rope=rope)
    llamascopium_write.write(lorsa.saved(), tmp_path)
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
        ({"two\nlines\x1b[31m": 1}, r"'two\\nlines\\x1b\[31m' = 1"),
        ({"long": "y" * 1000}, r"long = 'y{79}\.\.\.$"),
        ({"d_model": 10**400}, "d_model is 10{79}.*no such number is meant"),
        ({"d_model": -12}, "d_model is -12, allowed: 1.."),
        ({"d_qk_head": -8}, "d_qk_head is -8, allowed: 1.."),
        ({"d_qk_head": 10**11}, "d_qk_head is 100000000000, allowed: 1.."),
        ({"expansion_factor": 1e308}, r"expansion_factor is 1e\+308, allowed"),
        ({"expansion_factor": 1e6}, "W_V is .24, 12., expected .12000000, 12."),
        ({"n_ctx": 0}, "n_ctx is 0, allowed"),
        ({"attn_scale": 5e-324}, "scale is inf; a finite number is meant"),
        ({"use_post_qk_ln": True, "normalization_type": "LN"}, "normalization_type is 'LN'"),
        ({"use_post_qk_ln": True}, "normalization_type is None"),
        ({"use_post_qk_ln": True, "normalization_type": "RMS", "eps": -1.0}, "eps is -1.0"),
        ({**NTK, "NTK_by_parts_high_freq_factor": 0.5}, "high_freq_factor above low"),
        ({**NTK, "old_context_len": -64}, "old_context_len -64; all must be above 0"),
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


@torch.no_grad()
def test_settings_that_are_left_out_are_their_defaults(tmp_path: Path) -> None:
    given = ("sae_type", "d_model", "expansion_factor", "hook_point_in", "hook_point_out")
    given += ("n_qk_heads", "d_qk_head", "rotary_dim", "n_ctx")
    config = foreign.settings(act_fn="relu")  # all else as Llamascopium has it
    weights = foreign.tensors(config)
    short = {name: config[name] for name in given}
    lorsa = Lorsa.from_pretrained(foreign.write(tmp_path, short, weights))
    assert lorsa.config.score_by_norm
    expected = foreign.compute(_x(config), config, weights)
    torch.testing.assert_close(
        _dense(lorsa, _x(config)).y_hat.double(), expected.y_hat, atol=1e-5, rtol=1e-5
    )
    foreign.write(
        tmp_path,
        {**short, "expansion_factor": 6.0, "act_fn": "topk"},
        {**weights, **{n: weights[n].repeat_interleave(3, dim=0) for n in ("W_V", "W_O", "b_V")}},
    )
    assert Lorsa.from_pretrained(tmp_path).config.top_k == 50
    (tmp_path / "config.json").write_text(json.dumps({**short, "expansion_factor": 6.0}))
    assert Lorsa.from_pretrained(tmp_path).config.top_k == 72  # relu: all that are positive


@pytest.mark.parametrize(
    ("with_bias", "named"), [(True, "b_D is missing, expected"), (False, "b_D is unknown")]
)
def test_a_bias_that_the_config_does_not_speak_of_is_named(
    with_bias: bool, named: str, tmp_path: Path
) -> None:
    weights = foreign.tensors(foreign.settings(use_decoder_bias=not with_bias))
    foreign.write(tmp_path, foreign.settings(use_decoder_bias=with_bias), weights)
    with pytest.raises(CheckpointError, match=named):
        Lorsa.from_pretrained(tmp_path)


def test_names_in_a_file_cannot_break_the_line(tmp_path: Path) -> None:
    config = foreign.settings()
    extra = {f"{i}\n\x1b[31m": torch.zeros(1) for i in range(30)}
    foreign.write(tmp_path, config, foreign.tensors(config) | extra)
    with pytest.raises(
        CheckpointError, match=r"'0\\n\\x1b\[31m' is unknown.*; and 18 more$"
    ) as error:
        Lorsa.from_pretrained(tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    config = foreign.settings()
    weights = foreign.tensors(config)
    weights["W_V"] = weights["W_V"].to(dtype)
    named = f"W_V is of {str(dtype).removeprefix('torch.')}, which is no dtype of weights"
    with pytest.raises(CheckpointError, match=named):
        Lorsa.from_pretrained(foreign.write(tmp_path, config, weights))


def test_complex_weights_are_named(tmp_path: Path) -> None:
    config = foreign.settings()
    weights = foreign.tensors(config)
    folder = foreign.write(tmp_path, config, weights)
    (folder / "sae_weights.safetensors").unlink()  # which older versions cannot write them to
    torch.save(weights | {"W_V": weights["W_V"].to(torch.complex64)}, folder / "sae_weights.pt")
    with pytest.raises(CheckpointError, match="W_V is of complex64, which is no dtype of weights"):
        Lorsa.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_floats_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    config = foreign.settings(norm_activation="inference")
    weights = foreign.tensors(config)
    weights["W_V"] = weights["W_V"].to(dtype)
    lorsa = Lorsa.from_pretrained(foreign.write(tmp_path, config, weights))
    assert torch.equal(lorsa.W_V, weights["W_V"].float())


def test_weights_with_nan_are_named(tmp_path: Path) -> None:
    config = foreign.settings()
    weights = foreign.tensors(config)
    weights["W_O"][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="W_O holds NaN"):
        Lorsa.from_pretrained(foreign.write(tmp_path, config, weights))


def _sparse(tensor: Tensor) -> Any:
    return tensor.to_sparse()


def _absent(tensor: Tensor) -> Any:
    return tensor.to("meta")


def _one_for_all(tensor: Tensor) -> Any:
    return torch.ones(1).expand(tensor.shape)


@pytest.mark.parametrize("change", [_sparse, _absent, _one_for_all])
def test_what_is_no_plain_tensor_is_named(change: Any, tmp_path: Path) -> None:
    config = foreign.settings()
    weights = foreign.tensors(config)
    torch.save({**weights, "W_V": change(weights["W_V"])}, tmp_path / "sae_weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"sae_weights.pt: W_V is no plain tensor"):
        Lorsa.from_pretrained(tmp_path)


def test_a_compressed_file_is_not_unpacked(tmp_path: Path) -> None:
    config = foreign.settings()
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "sae_weights.pt"
    torch.save(foreign.tensors(config), tmp_path / "plain.pt")
    with ZipFile(tmp_path / "plain.pt") as plain, ZipFile(path, "w", ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert torch.load(path, weights_only=True)  # torch alone would
    with pytest.raises(CheckpointError, match=r"is refused.*\(it is compressed"):
        Lorsa.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("rule", "entry", "named"),
    [
        ("jumprelu", {"threshold": 0}, "threshold of its entry 'lorsa' is 0"),
        ("jumprelu", {"threshold": "x"}, "threshold of its entry 'lorsa' is 'x'"),
        ("batchtopk", {"threshold": -1.0}, "threshold of its entry 'lorsa' is -1.0"),
        ("batchtopk", {"threshold": float("nan")}, "threshold of its entry 'lorsa' is nan"),
        ("batchtopk", {}, "threshold of its entry 'lorsa' is None"),
        ("batchtopk", {"has_threshold": "yes"}, "has_threshold is 'yes'; bool is meant"),
        ("topk", {"layer": "../../x"}, "layer is '../../x'"),
        ("topk", {"n_ctx": -1}, "n_ctx is -1"),
        ("topk", {"rope": {}}, "its entry 'lorsa' is wrong"),
        ("topk", {"rope": {"inv_freq": ["a"]}}, "its entry 'lorsa' is wrong"),
    ],
)
def test_a_wrong_entry_of_ours_is_named(
    rule: str, entry: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = foreign.settings(act_fn=rule)
    weights = foreign.tensors(config)
    foreign.write(tmp_path, config | {"lorsa": {"has_threshold": True, **entry}}, weights)
    with pytest.raises(CheckpointError, match=named):
        Lorsa.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("hook_in", "hook_out", "layer"),
    [
        ("blocks.3.ln1.hook_normalized", "blocks.3.hook_attn_out", 3),
        ("blocks.3.ln1.hook_normalized", "blocks.4.hook_attn_out", None),
        ("blocks.3.ln1.hook_normalized", "blocks.3.hook_mlp_out", None),
        ("embed.blocks.3.hook", "blocks.3.hook_attn_out", None),
        ("blocks." + "9" * 5000 + ".ln1.hook_normalized", "x", None),
    ],
)
def test_only_an_attention_s_own_output_names_its_layer(
    hook_in: str, hook_out: str, layer: int | None, tmp_path: Path
) -> None:
    config = foreign.settings(
        norm_activation="inference", hook_point_in=hook_in, hook_point_out=hook_out
    )
    lorsa = Lorsa.from_pretrained(foreign.write(tmp_path, config, foreign.tensors(config)))
    assert lorsa.config.layer == layer


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
    from lorsa.dictionaries.formats.foreign import Settings
    from lorsa.dictionaries.formats.rotary_settings import spell_rope, take_rope

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
