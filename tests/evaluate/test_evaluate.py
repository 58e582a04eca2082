"""Fidelity of runs: on the store, and inside the language model."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import AnalyzeError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import Fidelities, evaluate_run, evaluate_runs
from lorsa.evaluate.losses import CrossEntropy, Replacements
from lorsa.language.blocks import attention_sites
from lorsa.language.edit import replaced
from lorsa.progress import Measured
from lorsa.sites import attention_ports
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from tiny import N_CTX, make_model
from unseal import change_json


def _train(layer: int, store_folder: Path, out: Path) -> Path:
    settings: dict[str, Any] = {"top_k": 6, "batch_tokens": 4 * N_CTX, "train_tokens": 80 * N_CTX}
    train(TrainConfig(store=store_folder, layer=layer, out=out, device="cpu", **settings))
    return out


@pytest.fixture(scope="module")
def run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(1, store_folder, tmp_path_factory.mktemp("runs") / "layer-1")


@pytest.fixture(scope="module")
def run_2(store_folder: Path, run: Path) -> Path:
    return _train(2, store_folder, run.parent / "layer-2")


def test_without_a_model_only_the_store_is_read(run: Path, store_folder: Path) -> None:
    found = evaluate_run(EvalConfig(run=run, store=store_folder, device="cpu"))
    store = ActivationStore.open(store_folder)
    assert found.cross_entropy is None
    assert found.n_tokens == len(store.held_out_seqs) * N_CTX
    assert 0 < found.fvu < 1
    data = found.to_dict()
    assert data["cross_entropy"] is None
    assert data["dead_window_tokens"] == data["n_tokens"]
    assert [len(values) for values in data["by_position"].values()] == [N_CTX] * 5


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
        assert found.replaced == pytest.approx(loss(model), rel=1e-5)
    assert 0 < found.increase_se < 1
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    assert found.zero_ablated == pytest.approx(loss(model), rel=1e-5)
    mean = store.activations(attention_ports(1), store.train_seqs[:64]).y.mean(dim=(0, 1))
    o_proj = model.model.layers[1].self_attn.o_proj
    o_proj.bias = torch.nn.Parameter(mean)
    assert found.mean_ablated == pytest.approx(loss(model), rel=1e-5)


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
    with pytest.raises(AnalyzeError, match=r"loss \(replaced\) is not finite"):
        evaluate_run(config)


def test_another_revision_of_the_model_is_refused(
    run: Path, store_folder: Path, tmp_path: Path
) -> None:
    """Ids alone were compared, so figures were of a model that the run had never seen."""
    store = shutil.copytree(store_folder, tmp_path / "acts")
    model = json.loads((store / "manifest.json").read_text())["model"]
    for name in ("manifest.json", "journal/plan.json"):
        change_json(store / name, model=model | {"revision": "b" * 40}, checksums={})
    lorsa = Lorsa.from_pretrained(run)
    lorsa.config = dataclasses.replace(lorsa.config, base_revision="a" * 40, store_uuid="another")
    lorsa.save_pretrained(tmp_path / "run")
    asked = EvalConfig(run=tmp_path / "run", store=store, device="cpu")
    with pytest.raises(AnalyzeError, match=f"of revision {'a' * 40} of .*{'b' * 40}: give a store"):
        evaluate_run(asked)
    for revision in ("b" * 40, None):  # the same one, and one that is not known
        lorsa.config = dataclasses.replace(lorsa.config, base_revision=revision)
        lorsa.save_pretrained(tmp_path / f"run-{revision}")
        assert evaluate_run(dataclasses.replace(asked, run=tmp_path / f"run-{revision}")).fvu < 1


def test_one_sequence_has_no_standard_error(
    run: Path, store_folder: Path, model_folder: Path
) -> None:
    config = EvalConfig(run=run, store=store_folder, model=str(model_folder), ce_tokens=N_CTX)
    found = evaluate_run(config).cross_entropy
    assert found is not None
    assert found.increase_se is None


def test_shares_recovered() -> None:
    rest: dict[str, Any] = {
        "kl": Replacements(0.1, 1.0, 0.5, 0.4),
        "top1_agreement": Replacements(0.9, 0.5, 0.6, 0.7),
        "by_position": {},
        "increase_se": 0.0,
        "n_tokens": 9,
    }
    ce = CrossEntropy(
        original=2.0, replaced=2.1, random=2.4, zero_ablated=3.0, mean_ablated=2.5, **rest
    )
    assert ce.recovered_from_zero == pytest.approx(0.9)
    assert ce.recovered_from_mean == pytest.approx(0.8)
    useless = CrossEntropy(
        original=2.0, replaced=2.1, random=2.4, zero_ablated=2.0, mean_ablated=1.9, **rest
    )
    assert useless.recovered_from_zero is None
    assert useless.recovered_from_mean is None  # ablation even helps


@pytest.fixture(scope="module")
def both(run: Path, run_2: Path, store_folder: Path, model_folder: Path) -> Fidelities:
    """Both layers, in the model too."""
    return evaluate_runs(_configs([run, run_2], store_folder, model_folder))


def _configs(
    runs: list[Path], store: Path, model: Path | None, *, each: bool = True
) -> list[EvalConfig]:
    settings: dict[str, Any] = {"store": store, "ce_tokens": 3 * N_CTX, "device": "cpu"}
    settings["each"] = each
    name = None if model is None else str(model)
    return [EvalConfig(run=run, model=name, **settings) for run in runs]


def test_each_of_several_runs_is_measured_as_it_is_alone(
    both: Fidelities, run: Path, run_2: Path, store_folder: Path, model_folder: Path
) -> None:
    alone = [evaluate_run(c) for c in _configs([run, run_2], store_folder, model_folder)]
    assert [found.to_dict() for found in both.runs] == [found.to_dict() for found in alone]


def test_together_all_layers_are_replaced_at_once(
    both: Fidelities, run: Path, run_2: Path, store_folder: Path
) -> None:
    """Against a model in which both layers are replaced, and both are ablated, by hand."""
    found = both.together
    assert found is not None
    store = ActivationStore.open(store_folder)
    tokens = store.tokens(store.held_out_seqs[:3]).long()
    model = make_model("llama-gqa")
    sites = attention_sites(model, [1, 2])

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=tokens, labels=tokens).loss)

    original = loss()
    assert found.original == pytest.approx(original, rel=1e-5)
    lorsas = [Lorsa.from_pretrained(folder) for folder in (run, run_2)]
    with replaced(sites[0], lorsas[0]), replaced(sites[1], lorsas[1]):
        assert found.replaced == pytest.approx(loss(), rel=1e-5)
    with replaced(sites[0], torch.zeros_like), replaced(sites[1], torch.zeros_like):
        assert found.zero_ablated == pytest.approx(loss(), rel=1e-5)
    data = both.to_dict()
    assert data["together"]["layers"] == [1, 2]
    assert data["together"]["cross_entropy"]["replaced"] == found.replaced
    json.dumps(data, allow_nan=False)


def test_all_at_once_alone_is_what_it_is_beside_each(
    both: Fidelities, run: Path, run_2: Path, store_folder: Path, model_folder: Path
) -> None:
    found = evaluate_runs(_configs([run, run_2], store_folder, model_folder, each=False))
    assert found.together == both.together
    assert [of_run.cross_entropy for of_run in found.runs] == [None, None]


def test_all_at_once_alone_is_refused_where_it_cannot_be(
    run: Path, store_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"several runs: name more"):
        evaluate_runs(_configs([run], store_folder, model_folder, each=False))
    with pytest.raises(ValueError, match=r"two runs write 1.attn_out, so"):
        evaluate_runs(_configs([run, tmp_path / "copy"], store_folder, model_folder, each=False))


def test_two_runs_of_one_layer_are_not_put_together(
    run: Path, store_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    found = evaluate_runs(_configs([run, tmp_path / "copy"], store_folder, model_folder))
    assert found.together is None
    assert found.runs[0].cross_entropy == found.runs[1].cross_entropy


def test_configs_differ_in_their_run_alone(run: Path, store_folder: Path) -> None:
    one, two = _configs([run, run], store_folder, None)
    with pytest.raises(ValueError, match="differ in run alone"):
        evaluate_runs([one, dataclasses.replace(two, tokens=5)])
    with pytest.raises(ValueError, match="one or more"):
        evaluate_runs([])


def test_what_it_tells(run: Path, store_folder: Path, model_folder: Path) -> None:
    told: list[Any] = []
    evaluate_runs(_configs([run], store_folder, model_folder), report=told.append)
    steps = [event for event in told if isinstance(event, Measured)]
    assert {event.what for event in steps} == {"layer 1 on the store", "in the model, 5 times"}
    for what in {event.what for event in steps}:
        last = [event for event in steps if event.what == what][-1]
        assert last.done == last.total


def test_sigterm_stops_it_as_ctrl_c_does(run: Path, store_folder: Path) -> None:
    """It ended the process without a word."""

    def stop(event: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        evaluate_runs(_configs([run], store_folder, None), report=stop)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lorsa_of_another_model_is_named(run: Path, store_folder: Path, tmp_path: Path) -> None:
    lorsa = Lorsa.from_pretrained(run)
    lorsa.config = dataclasses.replace(lorsa.config, base_model="gpt2", store_uuid="other")
    lorsa.save_pretrained(tmp_path)
    with pytest.raises(AnalyzeError, match=r"is a Lorsa of gpt2 \(d_model 32\); .* holds"):
        evaluate_run(EvalConfig(run=tmp_path, store=store_folder))
    lorsa.config = dataclasses.replace(lorsa.config, layer=None)
    lorsa.save_pretrained(tmp_path)
    with pytest.raises(AnalyzeError, match="does not say which layer"):
        evaluate_run(EvalConfig(run=tmp_path, store=store_folder))
