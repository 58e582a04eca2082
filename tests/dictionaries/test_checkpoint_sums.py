"""Weights and config.json of one checkpoint load; damaged, or of two checkpoints, they do not."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from lorsa.dictionaries.checkpoint import is_bound
from lorsa.dictionaries.formats.llamascopium_write import write as write_llamascopium
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import CheckpointError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CONFIG = LorsaConfig(d_model=4, n_qk_heads=1, d_qk_head=2, n_ov_heads=2, top_k=1, scale=0.5)
FILES = ("config.json", "lorsa.safetensors")


def _save(folder: Path, config: LorsaConfig = CONFIG, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    lorsa = Lorsa(config)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_()
    lorsa.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    """A bit flipped in a run's weights, or in its scale, gave other numbers without a word."""
    path = _save(tmp_path) / name
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << (at * 5) % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError) as caught:
            Lorsa.from_pretrained(tmp_path)
        assert str(path) in str(caught.value) or str(tmp_path / FILES[0]) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(good)
    Lorsa.from_pretrained(tmp_path)


def test_a_bit_of_a_weight_names_the_weights(tmp_path: Path) -> None:
    path = _save(tmp_path) / "lorsa.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="lorsa.safetensors is damaged .*checksum is wrong"):
        Lorsa.from_pretrained(tmp_path)


@pytest.mark.parametrize("other", [{"scale": 1.0}, {"top_k": 2}, {"base_model": "some/other"}])
@pytest.mark.parametrize("name", FILES)
def test_a_pair_of_two_checkpoints_does_not_load(
    tmp_path: Path, name: str, other: dict[str, object]
) -> None:
    """New weights beside an old config.json computed what nobody trained, whichever was new."""
    one = _save(tmp_path / "one")
    two = _save(tmp_path / "two", dataclasses.replace(CONFIG, **other), seed=1)  # type: ignore[arg-type]
    shutil.copy(one / name, two / name)
    with pytest.raises(CheckpointError, match="config.json is damaged, or not the one that lorsa"):
        Lorsa.from_pretrained(two)


def test_spaces_and_order_are_no_content(tmp_path: Path) -> None:
    path = _save(tmp_path) / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), separators=(",", ":")))
    Lorsa.from_pretrained(tmp_path)


def test_weights_without_sums_load_as_before(tmp_path: Path) -> None:
    """Checkpoints of version 0.1.0 have none, nor do weights that another tool has rewritten."""
    path = _save(tmp_path) / "lorsa.safetensors"
    assert is_bound(tmp_path)
    tensors = load_file(path)
    for metadata in ({"format": "pt"}, None):
        save_file(tensors, path, metadata)
        assert not is_bound(tmp_path)
        loaded = dict(Lorsa.from_pretrained(tmp_path).named_parameters())
        assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_dtype_are_bound(tmp_path: Path, dtype: torch.dtype) -> None:
    Lorsa(CONFIG).to(dtype).save_pretrained(tmp_path)
    assert is_bound(tmp_path)
    Lorsa.from_pretrained(tmp_path)


def test_other_tools_formats_stay_as_they_are(tmp_path: Path) -> None:
    lorsa = Lorsa.from_pretrained(_save(tmp_path / "ours"))
    write_llamascopium(lorsa.saved(), tmp_path / "theirs")
    with safe_open(tmp_path / "theirs/sae_weights.safetensors", framework="pt") as file:
        assert file.metadata() == {"version": "2.0.0b34"}


def test_a_lorsa_saved_again_has_the_same_bits(tmp_path: Path) -> None:
    """Its sums were in another order each time: another SHA-256 in training.json."""
    lorsa = Lorsa(
        LorsaConfig(d_model=8, n_qk_heads=2, d_qk_head=4, n_ov_heads=6, top_k=3, scale=1.0)
    )
    found = set()
    for number in range(8):
        lorsa.save_pretrained(tmp_path / str(number))
        found.add((tmp_path / str(number) / "lorsa.safetensors").read_bytes())
    assert len(found) == 1
