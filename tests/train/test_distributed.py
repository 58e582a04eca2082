"""Several processes: the run of one, whatever is shared how, and whatever kills them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.kinds import load
from lorsa.errors import TrainError
from lorsa.train.checkpoint import checkpoints
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from runs import STEP, config
from safetensors.torch import load_file
from tiny import N_CTX

N_KILLS = 4
HERE = Path(__file__).parent
Launch = Callable[..., "subprocess.Popen[str]"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {"exact": True},
    "shard": {"shard": True},
    "parts": {"micro_batch_tokens": N_CTX},
    "shard-parts": {"shard": True, "micro_batch_tokens": N_CTX},
    "uneven": {"batch_tokens": 5 * N_CTX},
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu-shard": {"activation": "jumprelu", "shard": True},
    "masked": {"loss_mask": "norm>1.1x"},
    "sae": {"kind": "sae", "activation": "batchtopk"},
    "sae-exact": {"kind": "sae", "exact": True},
    "transcoder-exact": {"kind": "transcoder", "skip": True, "exact": True},
    "transcoder-shard": {"kind": "transcoder", "prefixes": [0.25, 1], "skip": True, "shard": True},
}


def launch(
    n: int, store: Path, out: Path, variants: dict[str, Any], launcher: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    """Start a drill in so many processes."""
    command = [
        sys.executable,
        *launcher,
        str(HERE.parent / "runs.py"),
        str(n),
        str(store),
        str(out),
    ]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, json.dumps(variants)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def drill(n: int, store: Path, out: Path, variants: dict[str, Any]) -> None:
    """Run a drill to its end."""
    process = launch(n, store, out, variants)
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(run / "lorsa.safetensors") for run in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def one(sited: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, every loss noted."""
    out = tmp_path_factory.mktemp("one")
    drill(1, sited, out, VARIANTS)
    return out


@pytest.mark.parametrize("n", [2, 4])
def test_any_number_of_processes_makes_the_run_of_one(
    sited: Path, one: Path, tmp_path: Path, n: int
) -> None:
    """Losses and held-out quality within 1e-5; exact runs to the bit."""
    drill(n, sited, tmp_path, VARIANTS)
    for name in VARIANTS:
        expected, found = losses(one / name), losses(tmp_path / name)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5), name
        results = [json.loads((run / name / "run.json").read_text()) for run in (one, tmp_path)]
        assert results[1]["result"]["fvu"] == pytest.approx(results[0]["result"]["fvu"], rel=1e-5)
        assert results[1]["result"]["dead_fraction"] == results[0]["result"]["dead_fraction"]
    for name in (name for name in VARIANTS if name.endswith("exact")):
        assert losses(one / name) == losses(tmp_path / name)
        assert same_weights(one / name, tmp_path / name)
    for name in (name for name in VARIANTS if name.endswith("shard")):  # one like any other
        assert load(tmp_path / name).W_O.isfinite().all()


def test_runs_of_one_process_do_not_depend_on_how_they_are_computed(one: Path) -> None:
    """Sharding needs several processes; parts and float64 differ by rounding."""
    assert same_weights(one / "plain", one / "shard")
    for name in ("parts", "exact"):
        assert losses(one / name) == pytest.approx(losses(one / "plain"), rel=1e-5)


def test_killed_processes_go_on_to_the_bit(store_folder: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of two runs, one sharded; the same weights in the end."""
    often = {"checkpoint_every_tokens": 2 * STEP, "keep_checkpoints": 50}
    often |= {"train_tokens": 40 * STEP}
    variants = {"copies": often, "shard": often | {"shard": True}}
    drill(2, store_folder, tmp_path / "whole", variants)
    killed = tmp_path / "killed"

    def written() -> int:
        finished = len(list(killed.glob("*/lorsa.safetensors")))
        return 20 * finished + sum(len(checkpoints(killed / name)) for name in variants)

    moments = random.Random(0)
    for _ in range(N_KILLS):
        process = launch(2, store_folder, killed, variants)
        wanted = written() + moments.randint(1, 32 // N_KILLS)
        while written() < wanted and process.poll() is None:
            time.sleep(0.01)
        children = _children(process.pid)
        process.kill()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.communicate()
    assert not (killed / "shard/lorsa.safetensors").exists(), "killed too late"
    drill(2, store_folder, killed, variants)
    for name in variants:
        assert same_weights(tmp_path / "whole" / name, killed / name)
        assert losses(tmp_path / "whole" / name) == losses(killed / name)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def test_four_processes_go_on_where_one_was_stopped(
    store_folder: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sharded runs or not; test_team.py goes from two to one and to four."""
    monkeypatch.setattr("lorsa.train.group.LOG_EVERY_STEPS", 1)
    often = {"checkpoint_every_tokens": 6 * STEP, "keep_checkpoints": 9}
    asked = {name: VARIANTS[name] | often for name in ("plain", "shard")}
    for name, changes in asked.items():
        _rewind(config(store_folder, tmp_path / name, changes))
        assert len(checkpoints(tmp_path / name)) == 2
    drill(4, store_folder, tmp_path, asked)
    for name in asked:
        assert losses(tmp_path / name) == pytest.approx(losses(one / name), abs=1e-5, rel=1e-5)


def _rewind(settings: TrainConfig) -> None:
    """Leave a run as if it had been killed after its second checkpoint."""

    class Stop(Exception):  # noqa: N818
        pass

    def stop(event: Any) -> None:
        if getattr(event, "step", 0) >= 14:
            raise Stop

    with pytest.raises(Stop):
        train(settings, report=stop)


def test_sigterm_to_the_launcher_writes_a_checkpoint(store_folder: Path, tmp_path: Path) -> None:
    variants = {"run": {"train_tokens": 4000 * STEP}}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = launch(2, store_folder, tmp_path, variants, torchrun)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert len(checkpoints(tmp_path / "run")) == 1, told
    step = json.loads((checkpoints(tmp_path / "run")[0] / "state.json").read_text())["step"]
    assert max(losses(tmp_path / "run")) <= step


@pytest.mark.parametrize("n", [3, 5])
def test_no_process_waits_for_ever_at_the_end(store_folder: Path, tmp_path: Path, n: int) -> None:
    """Steps, held-out sequences and epochs that no number of processes divides."""
    variants = {
        "uneven": {"batch_tokens": 7 * N_CTX, "train_tokens": 200 * N_CTX, "shard": n == 3},
        "short": {"batch_tokens": 5 * N_CTX, "train_tokens": 5 * N_CTX},
    }
    drill(n, store_folder, tmp_path, variants)
    assert (tmp_path / "short" / "lorsa.safetensors").exists()


def test_accelerates_own_fsdp_is_refused(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainError, match="accelerate is set to --use_fsdp; leave it out and give"):
        train(config(store_folder, tmp_path / "run", {}))


def test_exact_does_not_go_with_parts_and_shards(store_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out shard"):
        config(store_folder, tmp_path, {"exact": True, "shard": True})
    with pytest.raises(ValueError, match="leave out micro_batch_tokens"):
        config(store_folder, tmp_path, {"exact": True, "micro_batch_tokens": 64})
