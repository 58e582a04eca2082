"""Sweeps: one read for many runs, each what it would have been alone."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.metrics import Tally
from lorsa.errors import UsageError
from lorsa.store.read.reader import ActivationStore
from lorsa.train.checkpoint import checkpoints
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import StepReport
from lorsa.train.request import Request, make_request
from lorsa.train.run import Run
from lorsa.train.sweep import grid, points, run_name, sweep, sweep_grid, write_sweep
from lorsa.train.team import all_processes
from lorsa.train.train import _groups, train, train_many
from runs import STEP, settings
from safetensors.torch import load_file
from tiny import N_CTX


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lorsa.safetensors")


def _same(a: Path, b: Path) -> bool:
    first, second = _weights(a), _weights(b)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_runs_of_a_sweep_are_those_of_single_commands(store_folder: Path, tmp_path: Path) -> None:
    """To the bit, and what is read is what one of them reads."""
    base = settings(store_folder)
    changes = grid({"top_k": [4, 8], "expansion": [4.0, 8.0]})
    result = sweep(points(base, changes, tmp_path / "sweep"), tmp_path / "sweep")
    assert [row["error"] for row in result.rows] == [None] * 4
    assert result.n_groups == 1
    for change, row in zip(changes, result.rows, strict=True):
        alone = TrainConfig(**{**base, **change, "out": tmp_path / "alone" / run_name(change)})
        assert train(alone).fvu == row["fvu"]
        assert _same(alone.out, Path(row["run"]))
    (one,) = train_many([TrainConfig(**base, out=tmp_path / "one")])
    assert result.bytes_read == one.bytes_read > 0


def test_a_grid_is_the_sweep_of_its_combinations_written_down(
    store_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    result = sweep_grid(settings(store_folder), {"top_k": [4, 8], "lr": [1e-3, -1.0]}, str(out))
    assert [(row["top_k"], row["lr"]) for row in result.rows] == [
        (4, 1e-3), (4, -1.0), (8, 1e-3), (8, -1.0)
    ]  # fmt: skip
    assert result.n_failed == 2
    written = json.loads((out / "sweep.json").read_text())
    assert written["rows"] == result.rows
    assert {"sweep.csv", "pareto.png"} < {path.name for path in out.iterdir()}
    with pytest.raises(UsageError, match="no run of the sweep can begin; the first: lr is -1.0"):
        sweep_grid(settings(store_folder), {"lr": [-1.0, -2.0]}, tmp_path / "none")


def test_a_run_that_fails_does_not_stop_the_others(store_folder: Path, tmp_path: Path) -> None:
    """At its start, in its middle, or already as a config."""
    (tmp_path / "lr=0.002").mkdir()
    (tmp_path / "lr=0.002" / "notes.txt").touch()
    changes: list[dict[str, Any]] = [{"lr": lr} for lr in (1e-3, 2e-3, 1e30, -1.0)]
    result = sweep(points(settings(store_folder), changes, tmp_path), tmp_path)
    errors = [row["error"] for row in result.rows]
    assert errors[0] is None
    assert result.rows[0]["fvu"] < 1
    assert "holds other things" in errors[1]
    assert "loss is" in errors[2]
    assert errors[3] == "lr is -1.0; allowed: above 0"
    assert not (tmp_path / "lr=-1.0").exists()
    assert (result.n_failed, result.ok) == (3, False)


def test_a_sweep_without_a_run_that_can_begin_is_an_error(
    store_folder: Path, tmp_path: Path
) -> None:
    asked = points(settings(store_folder), [{"lr": -1.0}], tmp_path)
    with pytest.raises(UsageError, match="no run of the sweep can begin; the first: lr is -1.0"):
        sweep(asked, tmp_path)


def test_a_stopped_sweep_goes_on_to_the_bit(store_folder: Path, tmp_path: Path) -> None:
    """Stopped where one run is finished and the others have checkpoints of different steps."""
    base = settings(store_folder)
    changes: list[dict[str, Any]] = [
        {"train_tokens": 10 * STEP},
        {"train_tokens": 20 * STEP, "checkpoint_every_tokens": 4 * STEP},
        {"train_tokens": 20 * STEP, "checkpoint_every_tokens": 6 * STEP},
    ]
    whole = sweep(points(base, changes, tmp_path / "whole"), tmp_path / "whole")

    def stop(told: Any) -> None:
        if isinstance(told.event, StepReport) and told.event.step == 20:
            raise KeyboardInterrupt

    asked = points(base, changes, tmp_path / "sweep")
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, tmp_path / "sweep", report=stop)
    runs = [Path(row["run"]) for row in whole.rows]
    steps = [[p.name[-2:] for p in checkpoints(tmp_path / "sweep" / run.name)] for run in runs]
    assert steps == [[], ["12", "16"], ["12", "18"]]
    again = sweep(asked, tmp_path / "sweep")
    assert again.ok
    assert all(_same(tmp_path / "sweep" / run.name, run) for run in runs)


def test_runs_that_cannot_share_a_read_are_trained_too(store_folder: Path, tmp_path: Path) -> None:
    """Another layer, order or step."""
    changes: list[dict[str, Any]] = [{}, {"layer": 2}, {"seed": 1}, {"batch_tokens": 2 * STEP}]
    changes += [{"seed": 1, "data_seed": 0}]
    result = sweep(points(settings(store_folder), changes, tmp_path), tmp_path)
    assert result.ok
    assert result.n_groups == 4


@pytest.mark.parametrize("at_least", [1, 3, 4])
def test_groups_are_cut_until_each_process_has_one(
    store_folder: Path, tmp_path: Path, at_least: int
) -> None:
    """A dear run alone beside a cheap pair was put back and taken again without end."""
    dear = TrainConfig(**settings(store_folder, layer=2, expansion=64.0), out=tmp_path / "dear")
    pair = [TrainConfig(**settings(store_folder), out=tmp_path / name) for name in "ab"]
    store, team = ActivationStore.open(store_folder), all_processes(dear)
    asked = [make_request(c, store, team, number=i) for i, c in enumerate([dear, *pair])]
    groups = _groups(asked, 1 << 40, at_least=at_least)
    assert len(groups) == (2 if at_least == 1 else 3)
    assert sorted(each.number for group in groups for each in group) == [0, 1, 2]


def test_two_runs_of_one_folder_are_refused(store_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(**settings(store_folder), out=tmp_path / "run")
    first, second = train_many([config, config])
    assert first.failure is None
    assert "another run has the folder" in str(second.failure)


def test_what_does_not_fit_together_is_trained_one_after_the_other(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorsa.train.train.run_bytes", lambda *_: 1_000)
    monkeypatch.setattr("lorsa.train.train.SHARED_BYTES", 0)
    monkeypatch.setattr("lorsa.train.train.require_room", lambda *_args, **_kwargs: None)
    monkeypatch.setattr("lorsa.train.train.free_memory_bytes", lambda _: 2_500)
    changes: list[dict[str, Any]] = [{"lr": lr} for lr in (1e-3, 2e-3, 3e-3)]
    result = sweep(points(settings(store_folder), changes, tmp_path), tmp_path)
    assert result.ok
    assert result.n_groups == 2


def test_processes_take_whole_runs(store_folder: Path, tmp_path: Path) -> None:
    """Each of two its own; the runs are those of one process, to the bit."""
    changes = grid({"top_k": [4, 8], "lr": [1e-3, 2e-3]})
    base = settings(store_folder, train_tokens=8 * STEP)
    one = sweep(points(base, changes, tmp_path / "one"), tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "lorsa", "sweep", "--store", str(store_folder), "--layer", "1", "--json"]
    command += ["--top-k", "4,8", "--lr", "1e-3,2e-3", "--out", str(tmp_path / "two")]
    command += ["--batch-tokens", str(STEP), "--tokens", str(8 * STEP), "--device", "cpu"]
    command += ["--set", f"init_tokens={16 * N_CTX}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["n_groups"] == 2
    assert [row["fvu"] for row in result["rows"]] == [row["fvu"] for row in one.rows]
    for row in one.rows:
        assert _same(Path(row["run"]), tmp_path / "two" / Path(row["run"]).name)
    assert (tmp_path / "two" / "sweep.csv").exists()


def test_the_table_is_written(store_folder: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"top_k": 4}, {"top_k": 0}]
    result = sweep(points(settings(store_folder), changes, tmp_path), tmp_path)
    write_sweep(result)
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["rows"] == result.rows
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["top_k"] for row in rows] == ["4", "0"]
    assert float(rows[0]["fvu"]) == result.rows[0]["fvu"]
    assert rows[1]["error"].startswith("top_k is 0")
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_names_of_runs_are_names_of_folders() -> None:
    assert run_name({"top_k": 32, "lr": 1e-3}) == "top_k=32,lr=0.001"
    assert run_name({"betas": (0.9, 0.95)}) == "betas=0.9-0.95"
    assert run_name({"loss_mask": "bos,norm>10x/.."}) == "loss_mask=bos-norm-10x-.."
    assert run_name({}) == "run"
    long = {f"setting_{i}": i for i in range(20)}
    assert len(run_name(long)) < 120
    assert run_name(long) != run_name(long | {"setting_19": 20})


def test_runs_may_change_different_settings(store_folder: Path, tmp_path: Path) -> None:
    """[[run]] tables with other keys made the plot fail once all was trained."""
    base = settings(store_folder, train_tokens=4 * STEP)
    changes: list[dict[str, Any]] = [{"init": "random", "lr": 2e-3}, {"top_k": 4}]
    result = sweep(points(base, changes, tmp_path), tmp_path)
    write_sweep(result)
    assert [(r["init"], r["lr"], r["top_k"]) for r in result.rows] == [
        ("random", 2e-3, 8),
        ("layer", 1e-3, 4),
    ]
    assert (tmp_path / "pareto.png").exists()


def test_damage_of_one_layer_leaves_the_others(store_folder: Path, tmp_path: Path) -> None:
    """A held-out shard that cannot be read ended all runs, also those of other layers."""
    shutil.copytree(store_folder, tmp_path / "acts")
    shard = ActivationStore.open(store_folder).manifest.held_out_shards[0]
    for path in (tmp_path / "acts/layers/1/attn_in/c").rglob("0"):
        if path.parts[-3] == str(shard):
            data = bytearray(path.read_bytes())
            data[100] ^= 1
            path.write_bytes(data)
    base = settings(tmp_path / "acts", train_tokens=4 * STEP)
    result = sweep(points(base, [{"layer": 1}, {"layer": 2}], tmp_path), tmp_path)
    assert "is damaged" in result.rows[0]["error"]
    assert result.rows[1]["error"] is None


def test_a_device_that_is_not_there_fails_its_run_alone(store_folder: Path, tmp_path: Path) -> None:
    """The run was trained on the first one's device, and said to be on its own."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    base = settings(store_folder, train_tokens=4 * STEP)
    result = sweep(points(base, [{"device": "cpu"}, {"device": "cuda"}], tmp_path), tmp_path)
    assert [row["error"] is None for row in result.rows] == [True, False]


def test_a_run_that_cannot_write_its_result_has_none(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("lorsa.train.run_folder.RunFolder.finish", fail)
    (outcome,) = train_many(
        [TrainConfig(**settings(store_folder, train_tokens=4 * STEP), out=tmp_path / "run")]
    )
    assert outcome.result is None
    assert "no room" in str(outcome.failure)


def test_metrics_that_cannot_be_written_fail_their_run_alone(
    store_folder: Path, tmp_path: Path
) -> None:
    """One run's full disk or missing folder ended all runs of its group."""
    base = settings(store_folder)
    spoilt = tmp_path / "sweep" / "top_k=4" / "metrics.jsonl"

    def spoil(told: Any) -> None:
        if isinstance(told.event, StepReport) and told.event.step == 10 and spoilt.is_file():
            spoilt.unlink()
            spoilt.mkdir()

    asked = points(base, [{"top_k": 4}, {"top_k": 8}], tmp_path / "sweep")
    result = sweep(asked, tmp_path / "sweep", report=spoil)
    assert result.rows[0]["error"].startswith(f"{spoilt} cannot be written (Is a directory)")
    assert result.rows[1]["error"] is None
    train(TrainConfig(**base, out=tmp_path / "alone"))
    assert _same(tmp_path / "alone", Path(result.rows[1]["run"]))


def test_a_run_that_cannot_be_built_or_measured_fails_alone(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run without room for its Lorsa, or for its measurement, ended all runs."""
    build, update = Run.__init__, Tally.update

    def no_room(run: Run, request: Request, *args: Any) -> None:
        if request.config.top_k == 4:
            raise torch.OutOfMemoryError("none left")
        build(run, request, *args)

    def no_eval(tally: Tally, *args: Any) -> None:
        if tally.dictionary.config.top_k == 5:
            raise torch.OutOfMemoryError("none left")
        update(tally, *args)

    monkeypatch.setattr(Run, "__init__", no_room)
    monkeypatch.setattr(Tally, "update", no_eval)
    base = settings(store_folder, train_tokens=4 * STEP)
    result = sweep(points(base, [{"top_k": k} for k in (4, 5, 8)], tmp_path), tmp_path)
    errors = [row["error"] for row in result.rows]
    assert errors[0] is not None
    assert errors[1] == "the memory is full; give --micro-batch-tokens"
    assert errors[2] is None


def test_metrics_that_are_no_text_do_not_keep_a_run_from_going_on(
    store_folder: Path, tmp_path: Path
) -> None:
    """Bytes that are no UTF-8, of a torn write, ended all runs in a traceback."""
    config = TrainConfig(**settings(store_folder, checkpoint_every_tokens=4 * STEP), out=tmp_path)

    def stop(event: Any) -> None:
        if isinstance(event, StepReport):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=stop)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe{")
    train(config)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps[-1] == 20
