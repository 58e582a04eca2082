"""From a language model to a trained Lorsa, for families whose attention is of another kind."""

from pathlib import Path

import pytest
import torch
from lorsa import Lorsa
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from tiny import N_CTX, make_model, make_tokenizer

KINDS = (
    "gemma2", "gemma3-multimodal", "gpt2", "olmo2", "cohere", "phi-norm", "llama4", "mpt",
    "gpt-oss", "qwen3-next", "deepseek-v3",
)  # fmt: skip
"""softcap; 1 + weight and a text model within; Conv1D; a norm over all heads; LayerNorms; chunks;
linear biases; sinks; gates; latents."""


@pytest.mark.parametrize("family", KINDS)
def test_a_lorsa_is_trained_and_read_again(family: str, tmp_path: Path, text_folder: Path) -> None:
    make_model(family).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model, store = str(tmp_path / "model"), tmp_path / "acts"
    harvest(
        HarvestConfig(
            model=model,
            layers="0",
            store=store,
            data=str(text_folder),
            n_ctx=N_CTX,
            tokens=40 * N_CTX,
            outputs="derive",
            device="cpu",
        )
    )
    settings = TrainConfig(
        store=store,
        layer=0,
        out=tmp_path / "run",
        n_ov_heads=128,
        top_k=32,
        batch_tokens=4 * N_CTX,
        device="cpu",
    )
    train(settings)
    lorsa = Lorsa.from_pretrained(tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in lorsa.parameters())
    if (norm := lorsa.config.qk_norm) is not None:
        assert norm.by_head == (family in ("olmo2", "cohere", "phi-norm"))
        assert lorsa.q_norm is not None
        assert not torch.equal(lorsa.q_norm, torch.ones_like(lorsa.q_norm))
    found = evaluate_run(EvalConfig(run=tmp_path / "run", store=store, model=model, device="cpu"))
    assert found.fvu < 0.7
    assert found.cross_entropy is not None
