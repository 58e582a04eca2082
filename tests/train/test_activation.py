"""Every rule trains: it learns, fires top_k heads on average, goes on to the bit, is shared."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import TrainError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.train.checkpoint import checkpoints
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import EvalReport, StepReport
from lorsa.train.train import train
from safetensors.torch import load_file
from tiny import N_CTX

STEP = 4 * N_CTX
TOP_K = 8
RULES = ("batchtopk", "jumprelu")


def _config(store: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "store": store,
        "layer": 1,
        "out": out,
        "top_k": TOP_K,
        "batch_tokens": STEP,
        "train_tokens": 40 * STEP,
        "eval_tokens": 2 * N_CTX,
        "init_tokens": 16 * N_CTX,
        "device": "cpu",
    } | changes
    return TrainConfig(**settings)


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("activation", RULES)
def test_a_run_learns_and_is_read_as_it_was(
    activation: str, store_folder: Path, tmp_path: Path
) -> None:
    evals: list[EvalReport] = []
    result = train(
        _config(store_folder, tmp_path / "run", activation=activation),
        report=lambda event: evals.append(event) if isinstance(event, EvalReport) else None,
    )
    assert result.fvu is not None
    assert result.fvu < evals[0].held_out.fvu < 1
    assert evals[0].held_out.l0 == pytest.approx(TOP_K, rel=0.2)
    assert result.l0 == pytest.approx(TOP_K, rel=0.2)
    lorsa = Lorsa.from_pretrained(tmp_path / "run")
    assert lorsa.config.activation == activation
    assert lorsa.config.max_l0 == 4 * TOP_K
    seen = evaluate_run(EvalConfig(run=tmp_path / "run", store=store_folder, device="cpu"))
    assert seen.fvu == pytest.approx(result.fvu, rel=1e-4)
    assert seen.l0 == pytest.approx(result.l0, rel=1e-3)


@pytest.mark.parametrize("activation", RULES)
def test_a_stopped_run_goes_on_to_the_bit(
    activation: str, store_folder: Path, tmp_path: Path
) -> None:
    changes = {"activation": activation, "top_k_start": 2.0, "train_tokens": 30 * STEP}
    train(_config(store_folder, tmp_path / "whole", **changes))

    def stop(event: Any) -> None:
        if isinstance(event, StepReport) and event.step == 20:
            raise KeyboardInterrupt

    config = _config(store_folder, tmp_path / "run", checkpoint_every_tokens=13 * STEP, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(config, report=stop)
    (folder,) = checkpoints(tmp_path / "run")
    assert "threshold" in load_file(folder / "lorsa.safetensors")
    train(config)
    found, expected = (
        load_file(tmp_path / name / "lorsa.safetensors") for name in ("run", "whole")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{}, {"loss_mask": "first"}])
@pytest.mark.parametrize("activation", RULES)
def test_parts_of_a_step_make_the_step(
    activation: str, changes: dict[str, str], store_folder: Path, tmp_path: Path
) -> None:
    settings = {"activation": activation, "train_tokens": 20 * STEP, **changes}
    train(_config(store_folder, tmp_path / "whole", **settings))
    train(_config(store_folder, tmp_path / "parts", micro_batch_tokens=2 * N_CTX, **settings))
    assert _losses(tmp_path / "parts") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-5)


def test_two_processes_train_as_one(store_folder: Path, tmp_path: Path) -> None:
    """Of steps of five sequences one takes two, the other three."""
    settings = {"batch_tokens": 5 * N_CTX, "train_tokens": 100 * N_CTX}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "lorsa", "sweep", "--store", str(store_folder), "--layer", "1", "--json"]
    command += ["--activation", ",".join(RULES), "--top-k", str(TOP_K), "--device", "cpu"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command += ["--set", f"init_tokens={16 * N_CTX}", "--out", str(tmp_path / "two"), "--together"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for activation in RULES:
        run, one = tmp_path / f"two/activation={activation}", tmp_path / activation
        train(_config(store_folder, one, activation=activation, **settings))
        assert _losses(run) == pytest.approx(_losses(one), rel=1e-5)
        found, expected = (load_file(path / "lorsa.safetensors") for path in (run, one))
        assert float(found["threshold"]) == pytest.approx(float(expected["threshold"]), rel=1e-4)


def test_what_does_not_go_together_is_named(store_folder: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"activation": "batchtopk", "select": "abs"}, "'batchtopk' goes with 'relu' only"),
        ({"max_l0": 16}, "max_l0 is 16; activation 'topk' lets top_k fire: leave it out"),
        ({"activation": "jumprelu", "max_l0": 4}, r"max_l0 is 4; allowed: 8..256"),
    ):
        with pytest.raises(TrainError, match=message):
            train(_config(store_folder, tmp_path / "run", **changes))
    for name, value in (("activation", "relu"), ("jump_bandwidth", 2.0), ("l0_coefficient", 0.0)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; allowed"):
            _config(store_folder, tmp_path / "run", **{name: value})
