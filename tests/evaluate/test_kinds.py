"""Dictionaries of every kind, measured by the same commands, against hooks written by hand."""

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa import cli
from lorsa.dictionaries.kinds import load
from lorsa.dictionaries.linear_config import SaeConfig
from lorsa.dictionaries.metrics import FVU
from lorsa.errors import StoreError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import Fidelities, evaluate_run, evaluate_runs
from lorsa.evaluate.random_features import mean_of, random_features
from lorsa.sites import Site
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.train import train_many
from tiny import N_CTX, make_model
from torch import Tensor
from typer.testing import CliRunner

KINDS: dict[str, dict[str, Any]] = {
    "layer-1": {"kind": "lorsa"},
    "1.mlp": {"kind": "transcoder", "skip": True},
    "2.mlp": {"kind": "transcoder", "layer": 2, "activation": "batchtopk"},
    "1.resid_out": {"kind": "sae", "activation": "jumprelu"},
}


@pytest.fixture(scope="module")
def runs(sites_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("runs")
    usual: dict[str, Any] = {"layer": 1, "top_k": 6, "batch_tokens": 4 * N_CTX, "device": "cpu"}
    usual |= {"store": sites_folder, "train_tokens": 40 * N_CTX}
    train_many([TrainConfig(out=out / name, **usual | own) for name, own in KINDS.items()])
    return [out / name for name in KINDS]


@pytest.fixture(scope="module")
def found(runs: list[Path], sites_folder: Path, model_folder: Path) -> Fidelities:
    return evaluate_runs(_configs(runs, sites_folder, model_folder))


def _configs(runs: list[Path], store: Path, model: Path | None) -> list[EvalConfig]:
    settings: dict[str, Any] = {"store": store, "ce_tokens": 3 * N_CTX, "device": "cpu"}
    name = None if model is None else str(model)
    return [EvalConfig(run=run, model=name, **settings) for run in runs]


@contextmanager
def _hooked(model: Any, runs: list[Path]) -> Iterator[None]:
    """Put dictionaries in place by hooks of plain torch on the modules of a Llama."""

    def put(folder: Path) -> Any:
        dictionary = load(folder)
        layer = dictionary.config.ports.writes[0].layer
        block = model.model.layers[layer]

        def attention(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            return (dictionary(kwargs["hidden_states"]), *output[1:])

        def mlp(_module: Any, args: Any, output: Any) -> Any:
            return dictionary(args[0])

        def stream(_module: Any, args: Any) -> Any:
            return (dictionary(args[0]), *args[1:])

        if dictionary.kind == "lorsa":
            return block.self_attn.register_forward_hook(attention, with_kwargs=True)
        if dictionary.kind == "transcoder":
            return block.mlp.register_forward_hook(mlp)
        return model.model.layers[layer + 1].register_forward_pre_hook(stream)

    handles = [put(folder) for folder in runs]
    yield
    for handle in handles:
        handle.remove()


def _loss(model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


def test_each_kind_alone_and_all_at_once_are_hooks_written_by_hand(
    found: Fidelities, runs: list[Path], sites_folder: Path
) -> None:
    store, model = ActivationStore.open(sites_folder), make_model("llama-gqa")
    tokens = store.tokens(store.held_out_seqs[:3]).long()
    assert [run.kind for run in found.runs] == [own["kind"] for own in KINDS.values()]
    for one in found.runs:
        assert one.cross_entropy is not None
        with _hooked(model, [Path(one.run)]):
            assert one.cross_entropy.replaced == pytest.approx(_loss(model, tokens), rel=1e-5)
    together = found.together
    assert together is not None
    assert together.original == pytest.approx(_loss(model, tokens), rel=1e-5)
    with _hooked(model, runs):
        assert together.replaced == pytest.approx(_loss(model, tokens), rel=1e-5)
    data = found.to_dict()["together"]
    assert data["layers"] == [1, 2]
    assert data["writes"] == ["1.attn_out", "1.mlp_out", "1.resid_out", "2.mlp_out"]
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_ablation_costs_is_of_the_site_that_is_written(
    found: Fidelities, sites_folder: Path
) -> None:
    store = ActivationStore.open(sites_folder)
    tokens = store.tokens(store.held_out_seqs[:3]).long()
    _lorsa, mlp, _other, stream = found.runs
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    assert mlp.cross_entropy is not None
    assert mlp.cross_entropy.zero_ablated == pytest.approx(_loss(model, tokens), rel=1e-5)
    model = make_model("llama-gqa")
    y = store.values(Site(1, "resid_out"), store.train_seqs[:64])
    mean = y.mean(dim=(0, 1))
    model.model.layers[2].register_forward_pre_hook(
        lambda _m, args: (mean.expand_as(args[0]), *args[1:])
    )
    assert stream.cross_entropy is not None
    assert stream.cross_entropy.mean_ablated == pytest.approx(_loss(model, tokens), rel=1e-5)


def test_random_features_are_what_they_are_said_to_be() -> None:
    """Against a dense row, and with a factor that nothing beside it betters."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 20, 8, generator=generator) * torch.arange(1, 9) + 2
    config = SaeConfig(layer=0, site="resid_out", d_model=8, n_features=30, top_k=9)
    mean = mean_of([y[:1], y[1:]])
    assert torch.allclose(mean, y.mean(dim=(0, 1)), atol=1e-6)
    sae = random_features(config, 4.4, mean, [y])
    assert sae.config.top_k == 4
    assert torch.allclose(sae.W_E.norm(dim=1), torch.ones(30))
    z = (y - mean) @ sae.W_E.detach().T
    best = z.clamp(min=0).topk(4, dim=2)
    kept = torch.zeros_like(z).scatter(2, best.indices, best.values) @ sae.W_E.detach()
    factor = float((kept * (y - mean)).sum() / kept.square().sum())
    assert torch.allclose(sae(y), mean + factor * kept, atol=1e-4)
    errors = []
    for other in (0.99, 1.0, 1.01):
        fvu = FVU()
        fvu.update(y, mean + other * factor * kept)
        errors.append(fvu.value)
    assert min(errors) == errors[1] < 1


def test_random_features_are_as_many_and_of_the_same_l0(
    found: Fidelities, runs: list[Path]
) -> None:
    for one, folder in zip(found.runs, runs, strict=True):
        assert one.random.l0 == pytest.approx(round(one.l0), abs=0.5)
        data = one.to_dict()
        assert set(data["random"]) == {"fvu", "fvu_usual", "nmse", "cosine", "l0"}
        assert 0 < data["random"]["fvu"] < 1
        counted = data["frequency_histogram"]
        n_features = load(folder).config.n_features
        assert sum(counted["n_features"]) + counted["n_silent"] == n_features


def test_two_runs_that_write_one_site_are_not_put_together(
    runs: list[Path], sites_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs[1], tmp_path / "copy")
    both = evaluate_runs(_configs([runs[1], tmp_path / "copy"], sites_folder, model_folder))
    assert both.together is None


def test_the_command_takes_runs_of_mixed_kinds(
    runs: list[Path], sites_folder: Path, model_folder: Path
) -> None:
    words = ["eval", *map(str, runs), "--model", str(model_folder), "--ce-tokens", str(N_CTX)]
    done = CliRunner().invoke(cli.app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [run["kind"] for run in told["runs"]] == [own["kind"] for own in KINDS.values()]
    shown = CliRunner().invoke(cli.app, words)
    assert shown.exit_code == 0
    assert "transcoder of 1.mlp_out" in " ".join(shown.stdout.split())
    one = CliRunner().invoke(cli.app, ["eval", str(runs[3])])
    assert one.exit_code == 0
    assert "SAE of 1.resid_out" in one.stdout
    assert "random features" in one.stdout


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_the_lorsa_among_runs_of_several_kinds_is_analysed_next(
    runs: list[Path], order: tuple[int, int]
) -> None:
    folders = [str(runs[n]) for n in order]
    done = CliRunner().invoke(cli.app, ["eval", *folders, "--model", "none", "--json"])
    assert json.loads(done.stdout)["next"] == f"lorsa analyze {runs[0]}"


@pytest.mark.parametrize("chosen", [(1,), (1, 3)])
def test_other_kinds_are_followed_by_a_look_at_their_card(
    runs: list[Path], chosen: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was named, and no command analyses them."""
    monkeypatch.chdir(tmp_path)
    folders = [str(runs[n]) for n in chosen]
    done = CliRunner().invoke(cli.app, ["eval", *folders, "--model", "none", "--json"])
    program, *words = shlex.split(json.loads(done.stdout)["next"])
    assert program == "lorsa"
    shown = CliRunner().invoke(cli.app, words)
    assert shown.exit_code == 0, shown.output
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_place_are_on_no_card(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "copy")
    folders = [str(runs[1]), str(tmp_path / "copy")]
    done = CliRunner().invoke(cli.app, ["eval", *folders, "--model", "none", "--json"])
    assert json.loads(done.stdout)["next"] is None


@pytest.mark.parametrize(
    "words",
    [
        ["analyze"],
        ["view"],
        ["find", "induction"],
        ["explain", "--endpoint", "http://127.0.0.1:1/v1", "--llm", "m"],
    ],
    ids=lambda words: words[0],
)
def test_what_is_of_lorsas_alone_refuses_other_kinds_in_a_line(
    runs: list[Path], words: list[str]
) -> None:
    done = CliRunner().invoke(cli.app, [*words, str(runs[1])])
    assert done.exit_code == 1
    (line,) = (each for each in done.stderr.splitlines() if each.startswith("error: "))
    assert "only Lorsas are analysed" in line
    assert "Traceback" not in done.stderr


def test_a_store_without_the_sites_says_which_harvest_adds_them(
    runs: list[Path], store_folder: Path
) -> None:
    with pytest.raises(StoreError, match=r"mlp.* is not in .*lorsa harvest .*--sites mlp"):
        evaluate_run(EvalConfig(run=runs[1], store=store_folder))
