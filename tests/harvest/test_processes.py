"""Several processes share a harvest, and any of them may be killed."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.harvest.processes import Processes, own_devices, this_process, wait_for_main
from lorsa.store.care.repair import verify_store
from lorsa.store.read.reader import ActivationStore
from small import digests

DRILL = Path(__file__).with_name("drill.py")


def _settings(config: HarvestConfig) -> dict[str, Any]:
    """Return what differs from the defaults, JSON-able."""
    found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {**found, "store": str(config.store)}


def test_twenty_kills_lose_nothing(harvest_config: HarvestConfig, tmp_path: Path) -> None:
    """Two processes, SIGKILLed twenty times in one harvest; then one finishes it."""
    whole = dataclasses.replace(harvest_config, store=tmp_path / "whole", batch_size=1)
    harvest(whole)
    config = dataclasses.replace(whole, store=tmp_path / "killed")
    command = [sys.executable, str(DRILL), json.dumps(_settings(config)), "0", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["n_killed"] >= 20
    assert told["committed"] == sorted(told["committed"])  # nothing that was committed is lost
    assert len(set(told["committed"])) > 3  # some launches got on, and were killed at it
    harvest(config)
    assert digests(config.store) == digests(whole.store)
    assert verify_store(config.store, full=True)["damages"] == []
    tokens = ActivationStore.open(config.store).tokens(range(130))
    assert torch.equal(tokens, ActivationStore.open(whole.store).tokens(range(130)))


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_launcher_shares_one_harvest(
    launcher: str, harvest_config: HarvestConfig, store_folder: Path, tmp_path: Path
) -> None:
    """The shards come from both processes, and one of them prints."""
    config = _settings(dataclasses.replace(harvest_config, store=tmp_path / "acts"))
    options = [
        word
        for name in ("model", "layers", "store", "data", "n_ctx", "tokens", "dtype", "device")
        for word in (f"--{name.replace('_', '-')}", str(config[name]))
    ]
    accelerate = "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 "
    accelerate += "--mixed_precision no --dynamo_backend no --main_process_port 0"
    torchrun = "torch.distributed.run --nproc-per-node 2 --master-port 0"
    start = (accelerate if launcher == "accelerate" else torchrun).split()
    done = subprocess.run(
        [sys.executable, "-m", *start, "-m", "lorsa", "harvest", *options, "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_tokens"] == 130 * config["n_ctx"]
    assert digests(tmp_path / "acts") == digests(store_folder)


def test_two_processes_without_a_launcher_join(
    harvest_config: HarvestConfig, store_folder: Path, tmp_path: Path
) -> None:
    """Both find nothing and begin; the second to create it resumes what the first did."""
    config = dataclasses.replace(harvest_config, store=tmp_path / "acts")
    code = "import json, sys; from lorsa.harvest.config import HarvestConfig\n"
    code += "from lorsa.harvest.harvest import harvest\n"
    code += "harvest(HarvestConfig(**json.loads(sys.argv[1])), report=print)"
    command = [sys.executable, "-c", code, json.dumps(_settings(config))]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for child in children:
        _, told = child.communicate(timeout=120)
        assert child.returncode == 0, told
    assert digests(config.store) == digests(store_folder)


def test_a_process_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert this_process() == Processes(0, 1, 0, 1)
    assert this_process().is_main
    monkeypatch.setenv("RANK", "9")
    assert this_process().is_main, "it waited for ever for a main process that there is not"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert this_process() == Processes(9, 16, 1, 8)
    assert not this_process().is_main


@pytest.mark.parametrize(
    ("n_gpus", "local_world", "shares"),
    [
        (1, 1, [["cuda:0"]]),
        (4, 1, [["cuda:0", "cuda:1", "cuda:2", "cuda:3"]]),
        (4, 2, [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]]),
        (2, 4, [["cuda:0"], ["cuda:1"], ["cuda:0"], ["cuda:1"]]),
    ],
)
def test_the_gpus_are_shared_out(
    n_gpus: int, local_world: int, shares: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    for rank, share in enumerate(shares):
        assert own_devices("auto", Processes(rank, local_world, rank, local_world)) == share
        assert own_devices("cpu", Processes(rank, local_world, rank, local_world)) == ["cpu"]


def test_waiting_for_the_main_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorsa.harvest import processes

    monkeypatch.setattr(processes, "POLL_S", 0.001)
    monkeypatch.setattr(processes, "REPORT_AFTER_S", 0.01)
    monkeypatch.setattr(processes, "REPORT_EVERY_S", 0.01)
    said: list[str] = []
    until = time.monotonic() + 0.05
    wait_for_main(lambda: time.monotonic() > until, said.append)
    assert said
    assert said[0].startswith("waiting for the main process")
