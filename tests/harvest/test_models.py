"""Loading: what is damaged or missing is one line, never random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.harvest import HarvestConfig, HarvestError, harvest, load_config, resolve
from lorsa.harvest.models import load_model, load_tokenizer
from lorsa.store import ActivationStore
from safetensors.torch import load_file, save_file
from tiny import N_CTX, TEXT, make_model, make_tokenizer, write_gguf


def _load(folder: Path, dtype: str = "auto") -> Any:
    path = resolve(str(folder))
    return load_model(path, load_config(path), dtype=dtype, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model that a test may damage."""
    make_model("llama-gqa").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_ready_to_run_in_float32(folder: Path) -> None:
    loaded = _load(folder)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.facts["architecture"] == "LlamaForCausalLM"
    assert loaded.facts["n_layers"] == 3
    assert loaded.facts["revision"] is None
    assert _load(folder, "bfloat16").facts["dtype"] == "bfloat16"


def test_missing_weights_are_named(folder: Path) -> None:
    """transformers goes on with random numbers."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(HarvestError, match=r"lacks weights .*: model.layers.1.self_attn.k_proj"):
        _load(folder)


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(HarvestError, match=r"another shape: model.norm.weight$"):
        _load(folder)


def test_a_file_cut_short_is_one_line(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(HarvestError, match="cannot be loaded: ") as error:
        _load(folder)
    assert "\n" not in str(error.value)


def test_a_model_without_tokenizer_is_named(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(HarvestError, match="tokenizer"):
        load_tokenizer(resolve(str(folder)))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, make_model("llama-gqa"), make_tokenizer())
    return path


def test_a_gguf_file_is_the_model_that_it_was_made_of(gguf_file: Path) -> None:
    tokens = torch.arange(40)[None]
    loaded, original = _load(gguf_file).model, make_model("llama-gqa")
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, original(tokens).logits, atol=1e-4)
    tokenizer = load_tokenizer(resolve(str(gguf_file)))
    assert tokenizer(TEXT)["input_ids"] == make_tokenizer()(TEXT)["input_ids"]


def test_a_gguf_file_is_harvested(gguf_file: Path, text_folder: Path, tmp_path: Path) -> None:
    config = HarvestConfig(
        model=str(gguf_file),
        layers="1",
        store=tmp_path / "acts",
        data=str(text_folder),
        n_ctx=N_CTX,
        tokens=4 * N_CTX,
        device="cpu",
    )
    harvest(config)
    facts = ActivationStore.open(config.store).manifest
    assert facts.layers[1]["self_check"]["passed"]
    assert facts.model["id"] == str(gguf_file)


def test_a_gguf_file_without_the_package_says_what_to_install(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorsa.harvest import models

    def lacking(*_: Any, **__: Any) -> Any:
        raise ImportError("gguf")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", lacking)
    monkeypatch.setattr(models, "find_spec", lambda _name: None)
    with pytest.raises(HarvestError, match="needs the package gguf; run: pip install gguf"):
        load_config(resolve(str(gguf_file)))
