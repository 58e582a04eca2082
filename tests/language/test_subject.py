"""The one door to a language model: what is known before its weights, and loading."""

from pathlib import Path

import pytest
import torch
from lorsa.errors import LanguageModelError
from lorsa.language import subject
from lorsa.language.aliases import ModelPath
from lorsa.language.subject import Subject, load_language_model
from tiny import make_model, make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model that a test may damage."""
    make_model("llama-gqa").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_known_without_its_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    found = Subject.find(str(folder))
    assert (found.id, found.d_model, found.n_layers, found.n_vocab) == (str(folder), 32, 3, 400)
    assert found.longest == 128
    assert found.attention == {i: f"model.layers.{i}.self_attn" for i in range(3)}
    assert (found.has_tokenizer, found.has_weights) == (True, False)
    assert found.tokenizer()("A store").input_ids
    with pytest.raises(LanguageModelError, match="cannot be loaded"):
        found.load(devices=["cpu"])


@pytest.mark.parametrize(
    ("revisions", "taken"),
    [
        ({}, "present"),
        ({"owner/model": "old"}, "old"),
        ({"owner/model": None}, "present"),
        ({"owner/other": "old", None: "older"}, "present"),
    ],
)
def test_a_known_revision_is_taken_of_its_own_model_alone(
    revisions: dict[str | None, str | None], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ModelPath("owner/model", revision="present")
    monkeypatch.setattr(subject, "resolve", lambda name: path)
    monkeypatch.setattr(subject, "load_config", lambda path: path.revision)
    found = Subject.find("model", revisions=revisions)
    assert (found.path.revision, found.config) == (taken, taken)


def test_a_model_is_loaded_by_what_its_option_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_language_model(str(folder), device="cpu")
    assert (model.training, model.dtype) == (False, torch.float32)
    assert (
        tokenizer("A store").input_ids == Subject.find(str(folder)).tokenizer()("A store").input_ids
    )
    assert load_language_model(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert load_language_model(str(folder)).tokenizer is None
    with pytest.raises(LanguageModelError, match="no-such-model"):
        load_language_model("someone/no-such-model")
    with pytest.raises(ValueError, match="device is 'tpu'; allowed: auto, cpu, cuda"):
        load_language_model(str(folder), device="tpu")
    with pytest.raises(ValueError, match="dtype is 'int4'; allowed: auto, float32"):
        load_language_model(str(folder), dtype="int4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LanguageModelError, match="torch sees no GPU"):
        load_language_model(str(folder), device="cuda")
