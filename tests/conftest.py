"""Stores made of a tiny language model; nothing here reaches a network."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.store.read.reader import ActivationStore
from runs import no_picture
from sited import with_sites
from tiny import N_CTX, TEXT, make_model, make_tokenizer


@pytest.fixture(scope="session", autouse=True)
def quick_ends() -> Iterator[None]:
    """Let runs draw no curves; test_curves.py draws, and so does every command in a process."""
    gc.freeze()  # each run collects garbage at its end, and the modules are none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorsa.train.report.reporting.draw_curves", no_picture)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers loads: a three-layer Llama with grouped heads."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model("llama-gqa").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some documents."""
    folder = tmp_path_factory.mktemp("text")
    words = TEXT.split()
    for i in range(12):
        turned = words[i * 7 :] + words[: i * 7]
        (folder / f"doc{i}.txt").write_text(" ".join(turned), "utf-8")
    return folder


@pytest.fixture(scope="session")
def harvest_config(model_folder: Path, text_folder: Path, tmp_path_factory: Any) -> HarvestConfig:
    """The request that `store_folder` was made by."""
    return HarvestConfig(
        model=str(model_folder),
        layers="1,2",
        store=tmp_path_factory.mktemp("stores") / "acts",
        data=str(text_folder),
        n_ctx=N_CTX,
        tokens=130 * N_CTX,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture(scope="session")
def store_folder(harvest_config: HarvestConfig) -> Path:
    """A finished store of two layers, not to be changed."""
    harvest(harvest_config)
    return harvest_config.store


@pytest.fixture(scope="session")
def sited(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That store with sites of MLPs and of the residual stream, not to be changed."""
    return with_sites(store_folder, tmp_path_factory.mktemp("sited") / "acts")


@pytest.fixture(scope="session")
def sites_folder(harvest_config: HarvestConfig, tmp_path_factory: Any) -> Path:
    """A finished store of two layers with all of their sites, not to be changed."""
    where = tmp_path_factory.mktemp("stores") / "all"
    harvest(replace(harvest_config, sites="attn,mlp,resid", store=where))
    return where


@pytest.fixture
def store(store_folder: Path) -> ActivationStore:
    """That store, open."""
    return ActivationStore.open(store_folder)
