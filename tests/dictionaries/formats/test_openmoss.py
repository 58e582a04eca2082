"""Checkpoints of the first Lorsa code give what its equations say; none of them runs code."""

import json
import os
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import CheckpointError
from torch import Tensor

CONFIG: dict[str, Any] = {
    "d_qk_head": 8,
    "d_ov_head": 1,
    "n_qk_heads": 6,
    "n_ov_heads": 24,
    "device": "cuda",
    "dtype": "torch.float32",
    "virtual_kv_num": 0,
    "use_z_relu": True,
    "n_ctx": 16,
    "layer": 3,
    "model_name": "EleutherAI/pythia-160m",
    "mode": "top_k",
    "top_k": 5,
    "avg_norm": {"in": 7.0, "out": 2.5},
    "d_model": 12,
    "attn_scale": 2.0,
    "positional_embedding_type": "rotary",
    "rotary_scale": 1,
    "rotary_dim": 8,
    "rotary_base": 10000,
    "rotary_adjacent_pairs": False,
}


def _write(folder: Path, config: dict[str, Any], weights: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "final.pth")
    return folder


def _weights() -> dict[str, Tensor]:
    """Return a state dict of theirs: values and outputs have a last or middle width of 1."""
    made = foreign.tensors(foreign.settings(norm_activation="inference"))
    made["b_O"] = made.pop("b_D")
    made["W_V"] = made["W_V"][:, :, None]
    made["W_O"] = made["W_O"][:, None, :]
    made["b_V"] = made["b_V"][:, None]
    return made


def _expected(x: Tensor, config: dict[str, Any]) -> foreign.Result:
    """Return the same by the equations, relu by Llamascopium's names, else by |z|."""
    w = {name: tensor.reshape(tensor.shape) for name, tensor in _weights().items()}
    for name in ("W_V", "W_O", "b_V"):
        w[name] = w[name].squeeze(2 if name == "W_V" else 1)
    w["b_D"] = w.pop("b_O")
    means = config["avg_norm"]
    names = {"act_fn": "topk", "attn_scale": config["attn_scale"]}
    settings = foreign.settings(rotary_adjacent_pairs=False, **names)
    if means is None:
        settings["norm_activation"] = "inference"
    else:
        w |= {
            f"dataset_average_activation_norm.{foreign.HOOK_IN}": torch.tensor(means["in"]),
            f"dataset_average_activation_norm.{foreign.HOOK_OUT}": torch.tensor(means["out"]),
        }
    if config["use_z_relu"] and config["mode"] == "top_k":
        return foreign.compute(x, settings, w)
    # |z| chooses as the positive ones of z and -z do, which are two sets of heads
    for name in ("W_V", "b_V", "W_O"):
        w[name] = torch.cat([w[name], -w[name]])
    order = torch.stack([torch.arange(24), torch.arange(24, 48)], dim=1).flatten()
    for name in ("W_V", "b_V", "W_O"):
        w[name] = w[name][order]  # so that both halves of a head share its QK head
    settings["top_k"] = config["top_k"] if config["mode"] == "top_k" else 24
    both = foreign.compute(x, settings, w)
    return foreign.Result(both.acts[..., ::2] - both.acts[..., 1::2], both.y_hat)


VARIANTS: dict[str, dict[str, Any]] = {
    "relu": {},
    "abs": {"use_z_relu": False},
    "dense": {"mode": "default", "top_k": None},
    "l1": {"mode": "l1", "use_z_relu": True},
    "unscaled": {"avg_norm": None},
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_it_computes_what_the_equations_say(name: str, tmp_path: Path) -> None:
    config = {**CONFIG, **VARIANTS[name]}
    lorsa = Lorsa.from_pretrained(_write(tmp_path, config, _weights()))
    x = torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(5))
    acts, ids = lorsa.encode(x)
    wide = acts.new_zeros(3, 10, 24).scatter_add(2, ids.long(), acts)
    expected = _expected(x, config)
    torch.testing.assert_close(wide.double(), expected.acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lorsa(x).double(), expected.y_hat, atol=1e-5, rtol=1e-5)
    assert (lorsa.config.layer, lorsa.config.base_model) == (3, "EleutherAI/pythia-160m")


@torch.no_grad()
def test_settings_that_are_left_out_are_their_defaults(tmp_path: Path) -> None:
    left_out = ("attn_scale", "rotary_base", "rotary_adjacent_pairs", "use_z_relu", "mode", "top_k")
    defaults = {"use_z_relu": False, "mode": "default", "attn_scale": 8**0.5}
    short = {name: value for name, value in CONFIG.items() if name not in left_out}
    lorsa = Lorsa.from_pretrained(_write(tmp_path / "short", short, _weights()))
    x = torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(5))
    expected = _expected(x, {**CONFIG, **defaults}).y_hat
    torch.testing.assert_close(lorsa(x).double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_outside_the_attention_turn_nothing(tmp_path: Path) -> None:
    config = {**CONFIG, "positional_embedding_type": "standard", "rotary_dim": None}
    assert Lorsa.from_pretrained(_write(tmp_path, config, _weights())).config.rope is None


@torch.no_grad()
def test_where_few_heads_are_positive_no_negative_one_fires(tmp_path: Path) -> None:
    weights = _weights()
    weights["b_V"] -= 100.0  # v is negative everywhere, but for one head
    weights["b_V"][7] += 200.0
    lorsa = Lorsa.from_pretrained(_write(tmp_path, CONFIG, weights))
    acts, ids = lorsa.encode(torch.randn(1, 6, 12))
    assert (acts >= 0).all()
    assert (ids[acts > 0] == 7).all()
    assert int((acts > 0).sum()) == 6


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_ov_head": 2}, "d_ov_head is 2"),
        ({"virtual_kv_num": 1}, "virtual_kv_num is 1"),
        ({"rotary_dim": None}, "rotary_dim is None"),
        ({"top_k": 25}, "top_k is 25; allowed: 1..24"),
        ({"avg_norm": {"in": 7.0}}, "avg_norm 'out' is nan"),
        ({"avg_norm": {"in": 10**400, "out": 1.0}}, "avg_norm 'in' is nan"),
        ({"d_qk_head": -8}, "d_qk_head is -8"),
        ({"n_ov_heads": 24 * 10**10}, "n_ov_heads is 240000000000, allowed: 1.."),
        ({"layer": -1}, "layer is -1; allowed: 0 or more"),
        ({"use_smolgen": True}, "use_smolgen = True"),
    ],
)
def test_settings_that_are_not_ours_are_named(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=named):
        Lorsa.from_pretrained(_write(tmp_path, {**CONFIG, **changes}, _weights()))


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    folder = _write(tmp_path / "bad", CONFIG, {**_weights(), "W_Q": _Payload(trap)})
    with pytest.raises(CheckpointError, match=r"final.pth is refused: it is damaged or holds more"):
        Lorsa.from_pretrained(folder)
    assert not trap.exists()
    torch.load(folder / "final.pth", weights_only=False)
    assert trap.exists()  # the trap does work


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04."])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = _write(tmp_path / "bad", CONFIG, _weights())
    (folder / "final.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"final.pth is refused") as caught:
        Lorsa.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"W_Q": "text"}])
def test_a_file_without_tensors_by_name_is_named(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not hold tensors by name"):
        Lorsa.from_pretrained(_write(tmp_path / "bad", CONFIG, content))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = _weights()
    weights["W_O"] = weights["W_O"].squeeze(1)
    with pytest.raises(CheckpointError, match=r"W_O is \[24, 12\], expected \[24, 1, 12\]"):
        Lorsa.from_pretrained(_write(tmp_path, CONFIG, weights))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="final.pth is missing; the folder has config.json"):
        Lorsa.from_pretrained(tmp_path)
