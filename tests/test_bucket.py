"""Both stages and the measuring, with the store in a bucket of a real S3 protocol server."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lorsa import cli
from lorsa.errors import StoreError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.harvest.plan import Plan
from lorsa.store.care.info import store_info
from lorsa.store.care.repair import verify_store
from lorsa.store.places import place
from s3 import serve_bucket
from safetensors.torch import load_file
from small import digests
from typer.testing import CliRunner

pytest.importorskip("obstore", reason="obstore is not installed (lorsa[s3])")
SIZES = "--layers 1 --n-ov-heads 32 --n-qk-heads 8 --top-k 4 --init random"
TRAIN = f"{SIZES} --batch-tokens 128 --tokens 2048 --device cpu"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serve_bucket() as url:
        yield url


@pytest.fixture(scope="module")
def acts(bucket: str, harvest_config: HarvestConfig) -> str:
    """The store of `store_folder`, in a bucket."""
    url = f"{bucket}/runs/acts"
    harvest(dataclasses.replace(harvest_config, store=url))
    return url


def lorsa(line: str) -> dict[str, Any]:
    """Run a command and return what it prints."""
    result = CliRunner().invoke(cli.app, [*shlex.split(line), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def require_same_bytes(url: str, folder: Path) -> None:
    root: Any = place(url)
    here = {name: (folder / name).read_bytes() for name in digests(folder)}
    there = {str(path.relative_to(root)): path for path in root.sizes()}
    assert {name: there[name].read_bytes() for name in here} == here


def test_a_harvest_into_a_bucket_writes_the_same_bytes(acts: str, store_folder: Path) -> None:
    require_same_bytes(acts, store_folder)
    assert lorsa(f"store verify {acts} --full")["ok"]


def test_a_bucket_takes_any_number_of_tokens(bucket: str, harvest_config: HarvestConfig) -> None:
    plans: list[Plan] = []

    class StopError(Exception):
        pass

    def report(event: Any) -> None:
        if isinstance(event, Plan):
            plans.append(event)
            raise StopError

    config = dataclasses.replace(harvest_config, store=f"{bucket}/plan/acts", tokens=None)
    with pytest.raises(StopError):
        harvest(config, report=report)
    assert plans[0].free_bytes is None
    assert plans[0].n_tokens > harvest_config.n_ctx * 130


def test_a_killed_harvest_into_a_bucket_goes_on(
    bucket: str, harvest_config: HarvestConfig, store_folder: Path
) -> None:
    url = f"{bucket}/killed/acts"
    command = [sys.executable, "-m", "lorsa", "harvest", "--store", url, "--json"]
    for name in ("model", "layers", "data", "n_ctx", "tokens", "device", "dtype"):
        command += [f"--{name.replace('_', '-')}", str(getattr(harvest_config, name))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None:
        try:
            info = store_info(url)
        except StoreError:  # not begun yet
            time.sleep(0.05)
            continue
        if info["n_missing_shards"] < info["n_shards"] - 1:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    info = store_info(url)
    assert 0 < info["n_missing_shards"] < info["n_shards"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert json.loads(done.stdout)["n_tokens"] == info["n_tokens"]
    assert "going on: " in done.stderr
    require_same_bytes(url, store_folder)
    assert verify_store(url, full=True)["ok"]


def test_a_run_on_a_bucket_is_the_run_on_a_disk(
    acts: str, store_folder: Path, tmp_path: Path
) -> None:
    results = {}
    for name, where in (("bucket", acts), ("disk", str(store_folder))):
        run = tmp_path / name
        trained = lorsa(f"train --store {where} --out {run} {TRAIN}")["runs"][0]
        measured = lorsa(f"eval {run}/layer-1 --store {where} --tokens 200 --device cpu")
        weights = load_file(run / "layer-1" / "lorsa.safetensors")
        parts = {part: tensor.numpy().tobytes() for part, tensor in weights.items()}
        results[name] = trained["fvu"], measured["fvu"], parts
    assert results["bucket"] == results["disk"]
