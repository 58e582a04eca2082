"""Lorsas on disk: what is written is what is read, and nothing else is."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from lorsa.dictionaries import checkpoint_files
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import CheckpointError
from lorsa.language.geometry import QKNorm, Rope
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

CONFIG = LorsaConfig(
    d_model=8,
    n_qk_heads=2,
    d_qk_head=4,
    n_ov_heads=6,
    top_k=3,
    scale=0.5,
    rope=Rope(inv_freq=(1.0, 0.1)),
    qk_norm=QKNorm(eps=1e-6),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lorsa = Lorsa(CONFIG)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_()
    lorsa.save_pretrained(tmp_path / "lorsa")
    return tmp_path / "lorsa"


def _unbind(folder: Path) -> None:
    """Write the weights as other tools do, without checksums."""
    path = folder / "lorsa.safetensors"
    save_file(load_file(path), path, {"format": "pt"})


def test_a_saved_lorsa_gives_the_same_output(saved: Path) -> None:
    first, second = Lorsa.from_pretrained(saved), Lorsa.from_pretrained(saved)
    first.save_pretrained(saved.parent / "again")
    again = Lorsa.from_pretrained(saved.parent / "again")
    x = torch.randn(1, 5, 8)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), again(x))
    assert again.config == CONFIG


def test_a_saved_lorsa_can_be_read_by_others_of_the_group(saved: Path) -> None:
    modes = {(saved / name).stat().st_mode for name in ("config.json", "lorsa.safetensors")}
    assert len(modes) == 1


def test_a_lorsa_of_before_there_were_activations_is_read(saved: Path) -> None:
    path = saved / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["activation"], content["config"]["max_l0"]
    path.write_text(json.dumps(content))
    _unbind(saved)  # nor were there checksums
    assert Lorsa.from_pretrained(saved).config == CONFIG


def test_a_missing_threshold_is_named(tmp_path: Path) -> None:
    lorsa = Lorsa(dataclasses.replace(CONFIG, activation="jumprelu"))
    lorsa.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "lorsa.safetensors")
    del tensors["threshold"]
    save_file(tensors, tmp_path / "lorsa.safetensors")
    with pytest.raises(CheckpointError, match=r"threshold is missing, expected \[\]"):
        Lorsa.from_pretrained(tmp_path)


def test_no_checkpoint_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds no dictionary .*there is notes.txt"):
        Lorsa.from_pretrained(tmp_path)


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / "lorsa.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors is missing"):
        Lorsa.from_pretrained(saved)


def test_damaged_weights_are_named(saved: Path) -> None:
    path = saved / "lorsa.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        Lorsa.from_pretrained(saved)


def test_wrong_shapes_are_named(saved: Path) -> None:
    tensors = load_file(saved / "lorsa.safetensors")
    tensors["W_V"] = tensors["W_V"][:5].clone()
    tensors["extra"] = torch.zeros(1)
    del tensors["b_O"]
    save_file(tensors, saved / "lorsa.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Lorsa.from_pretrained(saved)
    for part in ("W_V is [5, 8], expected [6, 8]", "b_O is missing", "extra is unknown"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema version 3; this version of lorsa reads 1 and 2"),
        ({"format": "other"}, "no dictionary's config"),
        ({"config": {"d_model": 3}}, "does not describe a Lorsa"),
        ({"config": CONFIG.to_dict() | {"top_k": 99}}, "top_k is 99"),
        ({"config": CONFIG.to_dict() | {"color": 1}}, "color"),
    ],
)
def test_a_config_that_cannot_be_read_says_why(
    saved: Path, change: dict[str, object], message: str
) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        Lorsa.from_pretrained(saved)


def test_a_config_that_is_no_json_says_so(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Lorsa.from_pretrained(saved)


def test_a_disk_that_is_full_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written .*No space left.*; make room"):
        Lorsa(CONFIG).save_pretrained(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_with_checkpoints_alone_names_the_newest(tmp_path: Path) -> None:
    for step in ("step-000000010", "step-000000020", "step-000000030.partial"):
        Lorsa(CONFIG).save_pretrained(tmp_path / "run/checkpoints" / step)
    with pytest.raises(CheckpointError, match="give .*step-000000020$"):
        Lorsa.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("d_model", "8", "d_model is '8'; int is meant"),
        ("d_model", 8.0, "d_model is 8.0; int is meant"),
        ("top_k", True, "top_k is True; int is meant"),
        ("d_model", 10**12, r"W_V is \[6, 8\], expected \[6, 1000000000000\]"),
        ("d_qk_head", 10**12, r"b_Q is \[2, 4\], expected \[2, 1000000000000\]"),
        ("scale", float("nan"), "scale is nan; a finite number is meant"),
        ("softcap", 0, "softcap is 0; allowed: above 0"),
        ("window", 0, "window is 0; allowed: 1 or more"),
        ("layer", -1, "layer is -1; allowed: 0 or more"),
        ("layer", "3", "layer is '3'"),
        ("base_model", "a\nb", r"base_model is 'a\\nb'; a line of text is meant"),
        ("base_model", "\x1b[31m", r"base_model is '\\x1b\[31m'; a line of text is meant"),
        ("rope", {"inv_freq": ["x"]}, "rope has a frequency .* no finite number"),
        ("rope", {"inv_freq": [1.0], "attention_scaling": "x"}, "attention_scaling"),
        ("qk_norm", {"eps": "x"}, "eps of the qk-norm is 'x'"),
    ],
)
def test_a_config_of_the_wrong_kind_is_named(
    saved: Path, field: str, value: object, named: str
) -> None:
    content = json.loads((saved / "config.json").read_text())
    content["config"][field] = value
    (saved / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=named) as caught:
        Lorsa.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_floats_are_named(saved: Path) -> None:
    weights = load_file(saved / "lorsa.safetensors")
    save_file({**weights, "W_V": weights["W_V"].to(torch.int8)}, saved / "lorsa.safetensors")
    with pytest.raises(CheckpointError, match="W_V is of int8, which is no dtype of weights"):
        Lorsa.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"format": "lorsa", "schema_version": 1, "config": []}', "does not describe a Lorsa"),
        ('{"format": "lorsa", "schema_version": "1\\n2"}', r"schema version '1\\n2'"),
    ],
)
def test_a_config_made_to_break_is_a_line(saved: Path, text: str, named: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=named) as caught:
        Lorsa.from_pretrained(saved)
    assert "\n" not in str(caught.value)
