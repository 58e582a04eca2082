"""Fidelity: on the store, and inside the language model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lorsa.analyze import AnalyzeError, CrossEntropy, EvalConfig, evaluate_run, replaced
from lorsa.analyze.fidelity import cross_entropy
from lorsa.harvest import attention_sites
from lorsa.model import Lorsa
from lorsa.store import ActivationStore
from lorsa.train import TrainConfig, train
from tiny import N_CTX, make_model


@pytest.fixture(scope="module")
def run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "layer-1"
    settings: dict[str, Any] = {"top_k": 6, "batch_tokens": 4 * N_CTX, "train_tokens": 80 * N_CTX}
    train(TrainConfig(store=store_folder, layer=1, out=out, device="cpu", **settings))
    return out


def test_without_a_model_only_the_store_is_read(run: Path, store_folder: Path) -> None:
    found = evaluate_run(EvalConfig(run=run, store=store_folder, device="cpu"))
    store = ActivationStore.open(store_folder)
    assert found.cross_entropy is None
    assert found.n_tokens == len(store.held_out_seqs) * N_CTX
    assert 0 < found.fvu < 1
    assert found.to_dict()["cross_entropy"] is None


def test_tokens_limits_what_is_measured(run: Path, store_folder: Path) -> None:
    found = evaluate_run(EvalConfig(run=run, store=store_folder, tokens=N_CTX + 1, device="cpu"))
    assert found.n_tokens == 2 * N_CTX


def test_cross_entropies_are_those_of_the_edited_model(
    run: Path, store_folder: Path, model_folder: Path
) -> None:
    """Against a model whose output projection is edited by hand."""
    config = EvalConfig(
        run=run, store=store_folder, model=str(model_folder), ce_tokens=3 * N_CTX, device="cpu"
    )
    found = evaluate_run(config).cross_entropy
    assert found is not None
    store = ActivationStore.open(store_folder)
    tokens = store.tokens(store.held_out_seqs[:3]).long()
    assert found.n_tokens == 3 * (N_CTX - 1)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model(input_ids=tokens, labels=tokens).loss)

    model = make_model("llama-gqa")
    assert found.original == pytest.approx(loss(model), rel=1e-5)
    with replaced(attention_sites(model, [1])[0], Lorsa.from_pretrained(run)):
        assert found.lorsa == pytest.approx(loss(model), rel=1e-5)
    assert 0 < found.increase_se < 1
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    assert found.zero_ablated == pytest.approx(loss(model), rel=1e-5)
    mean = store.activations(1, store.train_seqs[:64]).y.mean(dim=(0, 1))
    o_proj = model.model.layers[1].self_attn.o_proj
    o_proj.bias = torch.nn.Parameter(mean)
    assert found.mean_ablated == pytest.approx(loss(model), rel=1e-5)


def test_a_perfect_stand_in_recovers_everything(store_folder: Path) -> None:
    model = make_model("llama-gqa")
    site = attention_sites(model, [1])[0]
    store = ActivationStore.open(store_folder)
    seqs = store.held_out_seqs[:2]
    y = store.activations(1, seqs).y
    tokens = store.tokens(seqs)
    original = cross_entropy(model, tokens, site, None)
    again = cross_entropy(model, tokens, site, lambda _x: y)
    assert torch.allclose(again, original, rtol=1e-5)
    worse = cross_entropy(model, tokens, site, torch.zeros_like)
    assert not torch.allclose(worse, original, rtol=1e-4)


def test_a_loss_that_is_not_finite_is_named(
    run: Path, store_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    lorsa = Lorsa.from_pretrained(run)
    with torch.no_grad():
        lorsa.b_O.fill_(float("nan"))
    lorsa.save_pretrained(tmp_path / "broken")
    config = EvalConfig(
        run=tmp_path / "broken", store=store_folder, model=str(model_folder), ce_tokens=N_CTX
    )
    with pytest.raises(AnalyzeError, match=r"loss \(lorsa\) is not finite"):
        evaluate_run(config)


def test_one_sequence_has_no_standard_error(
    run: Path, store_folder: Path, model_folder: Path
) -> None:
    config = EvalConfig(run=run, store=store_folder, model=str(model_folder), ce_tokens=N_CTX)
    found = evaluate_run(config).cross_entropy
    assert found is not None
    assert found.increase_se is None


def test_replaced_is_undone() -> None:
    model = make_model("neox-partial")
    site = attention_sites(model, [1])[0]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        with pytest.raises(ZeroDivisionError), replaced(site, torch.zeros_like):
            assert not torch.equal(model(input_ids=tokens).logits, before)
            raise ZeroDivisionError
        assert torch.equal(model(input_ids=tokens).logits, before)


def test_shares_recovered() -> None:
    ce = CrossEntropy(
        original=2.0, lorsa=2.1, zero_ablated=3.0, mean_ablated=2.5, increase_se=0.0, n_tokens=9
    )
    assert ce.recovered_from_zero == pytest.approx(0.9)
    assert ce.recovered_from_mean == pytest.approx(0.8)
    useless = CrossEntropy(
        original=2.0, lorsa=2.1, zero_ablated=2.0, mean_ablated=1.9, increase_se=0.0, n_tokens=9
    )
    assert useless.recovered_from_zero is None
    assert useless.recovered_from_mean is None  # ablation even helps


def test_cross_entropy_is_torchs(store_folder: Path) -> None:
    model = make_model("qwen2")
    tokens = torch.randint(0, 400, (9, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    site = attention_sites(model, [0])[0]
    found = cross_entropy(model, tokens, site, None)
    assert found.shape == (9,)
    assert float(found.mean()) == pytest.approx(float(expected), rel=1e-5)


def test_a_lorsa_of_another_model_is_named(run: Path, store_folder: Path, tmp_path: Path) -> None:
    import dataclasses

    lorsa = Lorsa.from_pretrained(run)
    lorsa.config = dataclasses.replace(lorsa.config, base_model="gpt2", store_uuid="other")
    lorsa.save_pretrained(tmp_path)
    with pytest.raises(AnalyzeError, match=r"is a Lorsa of gpt2 \(d_model 32\); .* holds"):
        evaluate_run(EvalConfig(run=tmp_path, store=store_folder))
    lorsa.config = dataclasses.replace(lorsa.config, layer=None)
    lorsa.save_pretrained(tmp_path)
    with pytest.raises(AnalyzeError, match="does not say which layer"):
        evaluate_run(EvalConfig(run=tmp_path, store=store_folder))
