"""Processes that share a step: what one lacks is told on all, and none waits for ever."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lorsa.errors import TrainError
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.extent import extent, run_bytes
from lorsa.train.shape import shape_of
from lorsa.train.team import Team, all_processes, make_accelerator
from lorsa.train.train import train, train_many
from runs import STEP, config
from safetensors.torch import load_file

DRIVER = """
import json, os, signal, sys
from pathlib import Path
from lorsa.train import group
from lorsa.train.report.events import StepReport
from lorsa.train.train import train
from runs import config

group.LOG_EVERY_STEPS = 1
for out, changes in json.loads(sys.argv[2]):
    stop_at = changes.pop("stop_at", None)
    unseen = changes.pop("unseen_by", None)
    store = "nowhere" if unseen == int(os.environ["RANK"]) else sys.argv[1]
    def report(event):
        if isinstance(event, StepReport) and event.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        train(config(store, Path(out), changes), report=report)
    except KeyboardInterrupt:
        pass
"""
"""Runs, some of which ask themselves to stop."""


def _start(n: int, store: Path, jobs: list[tuple[Path, dict[str, Any]]]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n}", "--no-python", sys.executable, "-c", DRIVER, str(store)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, json.dumps([(str(out), changes) for out, changes in jobs])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _launch(n: int, store: Path, jobs: list[tuple[Path, dict[str, Any]]]) -> None:
    process = _start(n, store, jobs)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told


def _lines(run: Path, key: str) -> list[Any]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


WAYS: dict[str, dict[str, Any]] = {"copies": {}, "shard": {"shard": True}}
SHORT = {"train_tokens": STEP}


@pytest.fixture(scope="module")
def runs(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, whole and stopped; those that went on with one, two and four."""
    root = tmp_path_factory.mktemp("runs")
    jobs = [(root / "whole" / name, way) for name, way in WAYS.items()]
    for name, way in WAYS.items():
        jobs.append((root / "two" / name, way | {"stop_at": 12}))
        jobs.append((root / "two" / name, way))
        jobs.append((root / "one" / name, way | {"stop_at": 12}))
    _launch(2, store_folder, jobs)
    shutil.copytree(root / "one", root / "four")
    jobs = [(root / "four" / name, {"shard": name == "copies"}) for name in WAYS]
    jobs += [(root / "short-four" / name, way | SHORT) for name, way in WAYS.items()]
    _launch(4, store_folder, jobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorsa.train.group.LOG_EVERY_STEPS", 1)
        for name in WAYS:
            train(config(store_folder, root / "one" / name, {}))
    train(config(store_folder, root / "short-one", SHORT))
    return root


@pytest.mark.parametrize("name", list(WAYS))
def test_a_stopped_run_of_two_goes_on_to_the_bit(name: str, runs: Path) -> None:
    whole, two = (load_file(runs / n / name / "lorsa.safetensors") for n in ("whole", "two"))
    assert all(torch.equal(whole[tensor], two[tensor]) for tensor in whole)
    assert _lines(runs / "two" / name, "loss") == _lines(runs / "whole" / name, "loss")


@pytest.mark.parametrize("name", list(WAYS))
@pytest.mark.parametrize("number", ["one", "four"])
def test_a_stopped_run_of_two_goes_on_with_another_number(
    number: str, name: str, runs: Path
) -> None:
    """Copies as shards and shards as copies; every loss within 1e-5, relative."""
    expected = _lines(runs / "whole" / name, "loss")
    assert len(expected) == 20
    assert _lines(runs / number / name, "loss") == pytest.approx(expected, rel=1e-5, abs=0)


def test_held_out_figures_do_not_depend_on_the_number(runs: Path) -> None:
    """Of the same weights, those at the start, to 1e-9."""
    expected = _lines(runs / "short-one", "held_out")[0]
    for name in WAYS:
        found = _lines(runs / "short-four" / name, "held_out")[0]
        assert found == {key: pytest.approx(v, rel=1e-9) for key, v in expected.items()}


def test_a_store_that_one_process_does_not_see_is_named(store_folder: Path, tmp_path: Path) -> None:
    """The others waited for that process for ever."""
    process = _start(2, store_folder, [(tmp_path / "run", {"unseen_by": 1})])
    told, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert told.count("StoreError: process 1 of 2: nowhere ") == 2, told


def test_the_launcher_ends_the_others_when_one_dies(store_folder: Path, tmp_path: Path) -> None:
    process = _start(2, store_folder, [(tmp_path / "run", {"train_tokens": 10**6 * STEP})])
    metrics = tmp_path / "run" / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and '"loss"' in metrics.read_text(), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    workers[-1].kill()
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not psutil.wait_procs(workers, timeout=60)[1]


def _wait_for(ready: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    limit = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launcher_set_to_shard_is_told_of_the_option(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(TrainError, match=f"--use_{name.lower()}; leave it out and give .*--shard"):
        make_accelerator(config(tmp_path, tmp_path, {}))


def test_more_processes_than_gpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("lorsa.train.team.choose_device", lambda _: "cuda")
    monkeypatch.setattr("lorsa.train.team.choose_path", lambda *_: None)
    with pytest.raises(TrainError, match="4 processes .* 2 GPUs; start 2, or give --device cpu"):
        make_accelerator(config(tmp_path, tmp_path, {"device": "auto"}))


def test_whole_runs_apart_cannot_be_sharded(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(config: TrainConfig) -> Team:
        team = all_processes(config)
        team.world = 2
        return team

    monkeypatch.setattr("lorsa.train.train.all_processes", two)
    with pytest.raises(TrainError, match="each process takes whole runs; leave out --shard"):
        train_many([config(store_folder, tmp_path / "run", {"shard": True})], apart=True)


def test_run_bytes_knows_shards_and_exact_sums(store_folder: Path, tmp_path: Path) -> None:
    store, needed = ActivationStore.open(store_folder), {}
    for name in ("plain", "shard", "exact"):
        asked = config(store_folder, tmp_path, {} if name == "plain" else {name: True})
        needed[name] = run_bytes(shape_of(asked, store), extent(asked, store, 4), 4)
    assert needed["shard"] < needed["plain"] < needed["exact"]


def test_a_step_smaller_than_the_processes_is_refused(store_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"less than one .* 5 processes; use --batch-tokens 160"):
        extent(config(store_folder, tmp_path, {}), ActivationStore.open(store_folder), 5)
