"""Geometry that a store has wrong is found by whoever derives y of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lorsa.errors import StoreError, TrainError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from tiny import GQA, N_CTX, SIZES, SPECIAL, make_tokenizer
from unseal import change_json

ERRORS = (StoreError, TrainError)


@pytest.fixture(scope="module")
def derived(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A store without y of an OLMo whose limits act."""
    folder = tmp_path_factory.mktemp("derived")
    torch.manual_seed(0)
    config = transformers.OlmoConfig(**SIZES, **SPECIAL, **GQA, clip_qkv=1.0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    settings: dict[str, Any] = {"model": str(folder / "model"), "data": str(text_folder)}
    settings |= {"layers": "1", "n_ctx": N_CTX, "tokens": 40 * N_CTX, "device": "cpu"}
    harvest(HarvestConfig(**settings, store=folder / "acts", outputs="derive"))
    return folder / "acts"


def _config(store: Path, out: Path) -> TrainConfig:
    sizes = {"n_ov_heads": 64, "top_k": 8, "batch_tokens": 4 * N_CTX, "train_tokens": 12 * N_CTX}
    return TrainConfig(store=store, layer=1, out=out, device="cpu", **sizes)


@pytest.mark.parametrize(
    "change",
    [{"clip": None}, {"scale": 0.05}, {"rope": None}, {"window": 2}],
    ids=["clip", "scale", "rope", "window"],
)
def test_a_wrong_geometry_ends_training_and_evaluation_in_a_line(
    derived: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Such stores were trained on without a word: `clip_qkv` was read by no earlier version."""
    store = tmp_path / "acts"
    shutil.copytree(derived, store)
    train(_config(store, tmp_path / "run"))
    evaluate_run(EvalConfig(run=tmp_path / "run", store=store, device="cpu"))
    file = store / "manifest.json"
    modules = json.loads(file.read_text())["modules"]
    modules["1.attention"]["geometry"].update(change)
    if change == {"clip": None}:
        del modules["1.attention"]["geometry"]["clip"]
    change_json(file, modules=modules)
    with pytest.raises(ERRORS, match=r"1.attn_out: what is derived differs .* in its norm"):
        train(_config(store, tmp_path / "again"))
    with pytest.raises(ERRORS, match=r"1.attn_out: what is derived differs .* in its norm"):
        evaluate_run(EvalConfig(run=tmp_path / "run", store=store, device="cpu"))
