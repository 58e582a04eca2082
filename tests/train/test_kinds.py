"""SAEs and transcoders in training: all that runs of Lorsas can."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.kinds import load
from lorsa.dictionaries.metrics import evaluate
from lorsa.errors import StoreError, TrainError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.store.read.loader import held_out_batches
from lorsa.store.read.reader import ActivationStore
from lorsa.train.checkpoint import checkpoints
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import EvalReport, StepReport
from lorsa.train.request import make_request
from lorsa.train.shape import shape_of
from lorsa.train.team import all_processes
from lorsa.train.train import _groups, train, train_many
from runs import STEP, settings
from safetensors.torch import load_file
from sited import D_MODEL
from tiny import N_CTX
from unseal import change_json, unseal

SAMPLE_SEQS = 16
"""Sequences of a start, as in runs.settings."""
CRC_BYTES = 4
KINDS: dict[str, dict[str, Any]] = {
    "lorsa": {},
    "sae": {"kind": "sae"},
    "attn-out": {"kind": "sae", "site": "attn_out", "activation": "batchtopk", "loss_mask": "none"},
    "transcoder": {"kind": "transcoder", "activation": "jumprelu"},
    "skip": {"kind": "transcoder", "skip": True, "prefixes": (0.25, 1)},
}


def _config(store: Path, out: Path, name: str, **changes: Any) -> TrainConfig:
    return TrainConfig(**settings(store, **KINDS[name]) | changes, out=out)


def _same(a: Path, b: Path) -> bool:
    first, second = (load_file(run / "lorsa.safetensors") for run in (a, b))
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", list(KINDS)[1:])
def test_a_kind_learns_and_works_on_raw_activations(sited: Path, tmp_path: Path, name: str) -> None:
    events: list[Any] = []
    config = _config(sited, tmp_path / "run", name)
    result = train(config, report=events.append)
    evals = [event.held_out.fvu for event in events if isinstance(event, EvalReport)]
    assert result.fvu == evals[-1] < evals[0]
    assert (result.kind, result.site) == (config.kind, config.site)
    assert (result.n_features, result.n_ov_heads) == (256, None)
    dictionary = load(config.out)
    assert dictionary.config.ports == config.ports
    store = ActivationStore.open(sited)
    quality = evaluate(dictionary, held_out_batches(store, config.ports, batch_seqs=3))
    assert quality.fvu == pytest.approx(result.fvu, rel=1e-5)
    assert train(config) == result


@pytest.mark.parametrize("name", ["sae", "attn-out", "transcoder", "skip"])
def test_a_stopped_run_goes_on_to_the_bit(sited: Path, tmp_path: Path, name: str) -> None:
    whole = _config(sited, tmp_path / "whole", name)
    train(whole)
    config = _config(sited, tmp_path / "cut", name, checkpoint_every_tokens=6 * STEP)

    def stop(event: Any) -> None:
        if isinstance(event, StepReport) and event.step >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=stop)
    assert [path.name for path in checkpoints(config.out)] == ["step-000000006"]
    train(config)
    assert _same(config.out, whole.out)


def test_runs_of_all_kinds_share_a_read_and_are_what_they_are_alone(
    sited: Path, tmp_path: Path
) -> None:
    configs = [_config(sited, tmp_path / name, name) for name in KINDS]
    outcomes = train_many(configs)
    assert {o.group for o in outcomes} == {str(tmp_path / "lorsa")}
    alone = {name: _config(sited, tmp_path / f"{name}-alone", name) for name in KINDS}
    read = {name: train_many([config])[0].bytes_read for name, config in alone.items()}
    assert all(_same(tmp_path / name, config.out) for name, config in alone.items())
    each_once = read["lorsa"] + read["sae"] + read["transcoder"]  # the others have no other sites
    sample = SAMPLE_SEQS * (N_CTX * D_MODEL * 4 + CRC_BYTES)  # the start of attn-out is its own
    assert outcomes[0].bytes_read == each_once + sample


def test_runs_that_share_a_read_have_scales_of_their_own(
    sited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = ActivationStore.mean_norm  # of Lorsas alone
    monkeypatch.setattr(ActivationStore, "mean_norm", lambda self, site: 8 * mean(self, site))
    names, short = ("lorsa", "attn-out"), {"train_tokens": 3 * STEP}
    train_many([_config(sited, tmp_path / name, name, **short) for name in names])
    for name in names:
        alone = _config(sited, tmp_path / f"{name}-alone", name, **short)
        train(alone)
        assert _same(tmp_path / name, alone.out)


def test_runs_of_all_kinds_share_what_is_derived(
    harvest_config: HarvestConfig, tmp_path: Path
) -> None:
    """All sites of a layer from one array of int8: every kind as alone, to the bit."""
    smallest = {"sites": "attn,mlp,resid", "dtype": "int8", "outputs": "derive", "layers": "1"}
    store = tmp_path / "acts"
    harvest(replace(harvest_config, store=store, tokens=60 * N_CTX, **smallest))
    names, short = ("lorsa", "sae", "skip"), {"train_tokens": 3 * STEP}
    together = train_many([_config(store, tmp_path / name, name, **short) for name in names])
    apart = 0
    for name in names:
        alone = _config(store, tmp_path / f"{name}-alone", name, **short)
        apart += train_many([alone])[0].bytes_read
        assert _same(tmp_path / name, alone.out)
    assert together[0].bytes_read < apart / 1.5


def test_runs_of_a_layer_make_a_group_whatever_their_sites(sited: Path, tmp_path: Path) -> None:
    configs = [_config(sited, tmp_path / name, name) for name in KINDS]
    configs.append(_config(sited, tmp_path / "other", "transcoder", layer=2))
    team, store = all_processes(configs[0]), ActivationStore.open(sited)
    requests = [make_request(config, store, team, number=i) for i, config in enumerate(configs)]
    groups = _groups(requests, 1 << 40, at_least=1)
    assert [[each.number for each in group] for group in groups] == [[0, 1, 2, 3, 4], [5]]


def test_exact_and_parts_make_the_same_run_but_for_rounding(sited: Path, tmp_path: Path) -> None:
    whole = train(_config(sited, tmp_path / "whole", "skip"))
    for name, changes in {"exact": {"exact": True}, "parts": {"micro_batch_tokens": N_CTX}}.items():
        found = train(_config(sited, tmp_path / name, "skip", **changes))
        assert found.fvu == pytest.approx(whole.fvu, rel=1e-3)


def test_sites_that_the_store_lacks_are_named_with_their_harvest(
    sited: Path, store_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"1 \(mlp\) is not in .*lorsa harvest .*--sites mlp"):
        train(_config(store_folder, tmp_path / "run", "transcoder"))
    with pytest.raises(StoreError, match=r"2 \(resid_out\) is not in .*lorsa harvest"):
        train(_config(sited, tmp_path / "run", "sae", layer=2))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_kind_is_left_alone(sited: Path, tmp_path: Path) -> None:
    train(_config(sited, tmp_path / "run", "sae"))
    with pytest.raises(TrainError, match="another run .kind was 'sae', is 'transcoder'"):
        train(_config(sited, tmp_path / "run", "transcoder"))
    unseal(tmp_path / "run")
    change_json(tmp_path / "run" / "run.json", decisive=None)
    with pytest.raises(TrainError, match="run.json is damaged .no settings."):
        train(_config(sited, tmp_path / "run", "sae"))


def test_sizes_of_a_dictionary_are_those_asked_for(sited: Path, tmp_path: Path) -> None:
    store = ActivationStore.open(sited)
    shape = shape_of(_config(sited, tmp_path, "sae", expansion=3.2), store)
    assert (shape.n_features, shape.kind, shape.layer) == (103, "sae", 1)
    shape = shape_of(_config(sited, tmp_path, "transcoder", n_features=7, top_k=7), store)
    assert shape.n_features == 7
    with pytest.raises(TrainError, match=r"top_k is 8; allowed: 1..7 .n_features"):
        shape_of(_config(sited, tmp_path, "transcoder", n_features=7), store)
    with pytest.raises(TrainError, match="prefixes are 0.001,1"):
        shape_of(_config(sited, tmp_path, "sae", prefixes=(0.001, 1)), store)
