"""Models that lorsa knows nothing of: what can be understood is, of the others x and y are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.errors import HarvestError, TrainError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.selfcheck import understand
from lorsa.sites import attention_ports
from lorsa.store.care.info import store_info
from lorsa.store.care.merge import merge_stores
from lorsa.store.care.repair import verify_store
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from tiny import N_CTX, make_model, make_tokenizer, some_tokens
from torch import Tensor

UNKNOWN = {"bitnet": "model.layers.1.self_attn", "codegen": "transformer.h.1.attn"}
"""Families whose attention is not understood, and its module in layer 1."""


def _harvest(family: str, folder: Path, text: Path, **settings: Any) -> HarvestConfig:
    if not (folder / "model").exists():
        make_model(family).save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
    config = HarvestConfig(
        **{
            "model": str(folder / "model"),
            "layers": "1",
            "store": folder / "acts",
            "data": str(text),
            "n_ctx": N_CTX,
            "tokens": 40 * N_CTX,
            "device": "cpu",
            **settings,
        }
    )
    harvest(config)
    return config


def test_a_family_outside_the_table_is_understood_if_the_check_passes() -> None:
    model = make_model("gptj")
    site = attention_sites(model, [1])[0]
    with Capture(model, [site]) as capture:
        found = understand(model, site, capture.calls(some_tokens())[1])
    assert found.check.passed
    assert found.reading is not None
    assert found.reading.geometry.rope is not None
    assert found.reading.geometry.rope.interleaved
    assert found.facts()["geometry"]["n_heads"] == 4


@pytest.mark.parametrize("family", UNKNOWN)
def test_x_and_y_of_an_unknown_layer_are_kept(
    family: str, tmp_path: Path, text_folder: Path
) -> None:
    config = _harvest(family, tmp_path, text_folder, dtype="float32")
    store = ActivationStore.open(config.store)
    facts = store.manifest.modules["1.attention"]
    assert facts["geometry"] is None
    assert facts["weights"] == []
    assert facts["heads"] == {"n_heads": 4, "d_head": 8}
    assert facts["self_check"]["passed"] is False
    assert facts["self_check"]["reason"]
    model = make_model(family)
    caught: list[tuple[Tensor, Tensor]] = []
    model.get_submodule(UNKNOWN[family]).register_forward_hook(
        lambda _m, args, given, output: caught.append(
            (args[0] if args else given["hidden_states"], output[0])
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(input_ids=store.tokens([0, 3]).long())
    for stored, plain in zip(store.activations(attention_ports(1), [0, 3]), caught[0], strict=True):
        assert torch.allclose(stored, plain, rtol=2e-6, atol=1e-6)


def test_an_unknown_layer_whose_output_is_not_what_is_added_is_refused(
    tmp_path: Path, text_folder: Path
) -> None:
    """BLOOM's y had the residual stream in it, which the reason in the manifest alone said."""
    with pytest.raises(HarvestError, match=r"layer 1: the output of .*h.1.self_attention, .* adds"):
        _harvest("bloom", tmp_path, text_folder)
    assert not (tmp_path / "acts").exists()


def test_an_unknown_layer_can_be_used_for_all_but_what_needs_its_geometry(
    tmp_path: Path, text_folder: Path
) -> None:
    config = _harvest("bitnet", tmp_path, text_folder)
    settings: dict[str, Any] = {
        "store": config.store,
        "layer": 1,
        "out": tmp_path / "run",
        "n_ov_heads": 32,
        "top_k": 4,
        "batch_tokens": 4 * N_CTX,
        "device": "cpu",
    }
    with pytest.raises(TrainError, match=r"geometry is unknown \(.*\); give --init random"):
        train(TrainConfig(**settings))
    train(TrainConfig(**settings, init="random"))
    run = EvalConfig(run=tmp_path / "run", store=config.store, model=config.model, device="cpu")
    assert evaluate_run(run).cross_entropy is not None
    info = store_info(config.store)
    assert info["complete"]
    assert "heads" not in info["layers"]["1"]
    assert verify_store(config.store, full=True)["damages"] == []


def test_going_on_with_an_unknown_layer(tmp_path: Path, text_folder: Path) -> None:
    config = _harvest("bitnet", tmp_path, text_folder)
    (config.store / "manifest.json").unlink()
    harvest(config)
    ActivationStore.open(config.store)


def test_stores_of_unknown_layers_are_merged(tmp_path: Path, text_folder: Path) -> None:
    a = _harvest("bitnet", tmp_path, text_folder)
    other = tmp_path / "text"
    other.mkdir()
    (other / "more.txt").write_text(
        "Other text has other tokens, and is told in other words. " * 99
    )
    b = _harvest("bitnet", tmp_path, other, store=tmp_path / "more", tokens=4 * N_CTX)
    merge_stores([a.store, b.store], tmp_path / "both")
    assert (
        ActivationStore.open(tmp_path / "both").manifest.modules["1.attention"]["geometry"] is None
    )


def test_nothing_is_derived_of_an_unknown_layer(tmp_path: Path, text_folder: Path) -> None:
    with pytest.raises(HarvestError, match=r"layer 1: its geometry is unknown .*--outputs store"):
        _harvest("bitnet", tmp_path, text_folder, outputs="derive")
    assert not (tmp_path / "acts").exists()


def test_a_supported_model_that_is_not_understood_needs_consent(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorsa.language import readings

    monkeypatch.setattr(readings, "_scales", lambda *_: [0.1])
    with pytest.raises(HarvestError, match=r"does not understand this model. --no-selfcheck"):
        _harvest("llama-gqa", tmp_path, text_folder)
    assert not (tmp_path / "acts").exists()
    config = _harvest("llama-gqa", tmp_path, text_folder, selfcheck=False)
    assert ActivationStore.open(config.store).manifest.modules["1.attention"]["geometry"] is None
