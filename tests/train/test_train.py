"""Training: it learns, it stops cleanly, it goes on to the bit."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.metrics import evaluate
from lorsa.errors import CheckpointError, StoreError, TrainError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.seal import check_seal
from lorsa.sites import attention_ports
from lorsa.store.read.loader import held_out_batches
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.sampler import Sampler
from lorsa.train.checkpoint import checkpoints
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import EvalReport, StepReport
from lorsa.train.shape import shape_of
from lorsa.train.start import Initialiser, scales_of
from lorsa.train.train import train
from safetensors.torch import load_file
from small import edit_manifest, edit_table
from tiny import N_CTX

TwoProcesses = Callable[..., subprocess.CompletedProcess[str]]


def _config(store: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "store": store,
        "layer": 1,
        "out": out,
        "top_k": 8,
        "batch_tokens": 4 * N_CTX,
        "train_tokens": 40 * 4 * N_CTX,
        "eval_tokens": 2 * N_CTX,
        "init_tokens": 16 * N_CTX,
        "device": "cpu",
    } | changes
    return TrainConfig(**settings)


class Stop(Exception):  # noqa: N818
    """Ends a run from outside."""


def _stop_at(step: int) -> Any:
    def report(event: Any) -> None:
        if isinstance(event, StepReport) and event.step >= step:
            raise Stop

    return report


def test_training_improves_on_the_start(store_folder: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    result = train(_config(store_folder, tmp_path / "run"), report=events.append)
    evals = [event for event in events if isinstance(event, EvalReport)]
    assert [each.step for each in evals] == [0, 10, 20, 30, 40]
    assert result.fvu == evals[-1].held_out.fvu < evals[0].held_out.fvu < 1
    assert 0 < result.l0 <= 8
    assert result.train_tokens == 40 * 4 * N_CTX
    assert result.tokens_per_second > 0


def test_a_run_folder_holds_what_it_should(store_folder: Path, tmp_path: Path) -> None:
    result = train(_config(store_folder, tmp_path / "run"))
    names = {p.name for p in (tmp_path / "run").iterdir()}
    sealed = {"run.json", "metrics.jsonl", "config.json", "lorsa.safetensors"}
    assert names == sealed | {"curves.png", "seal.json"}
    assert json.loads((tmp_path / "run/seal.json").read_text())["files"].keys() == sealed
    assert check_seal(tmp_path / "run") == []
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["result"]["fvu"] == result.fvu
    assert run["config"]["lr"] == 1e-3
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30, 40]
    assert lines[-1]["held_out"]["fvu"] == result.fvu


def test_the_saved_lorsa_works_on_raw_activations(store_folder: Path, tmp_path: Path) -> None:
    result = train(_config(store_folder, tmp_path / "run"))
    lorsa = Lorsa.from_pretrained(tmp_path / "run")
    store = ActivationStore.open(store_folder)
    quality = evaluate(lorsa, held_out_batches(store, attention_ports(1), batch_seqs=3))
    assert quality.fvu == pytest.approx(result.fvu, rel=1e-5)
    assert quality.l0 == pytest.approx(result.l0, rel=1e-3)


def test_every_checkpoint_works_on_raw_activations(store_folder: Path, tmp_path: Path) -> None:
    config = _config(store_folder, tmp_path / "run", checkpoint_every_tokens=15 * 4 * N_CTX)
    with pytest.raises(Stop):
        train(config, report=_stop_at(20))
    lorsa = Lorsa.from_pretrained(checkpoints(tmp_path / "run")[-1])
    store = ActivationStore.open(store_folder)
    assert evaluate(lorsa, held_out_batches(store, attention_ports(1), batch_seqs=3)).fvu < 1


def test_a_finished_run_is_returned_as_it_is(store_folder: Path, tmp_path: Path) -> None:
    config = _config(store_folder, tmp_path / "run")
    first = train(config)
    said: list[Any] = []
    assert train(config, report=said.append) == first
    assert said == [f"{tmp_path / 'run'} is already finished"]


def test_the_same_seed_gives_the_same_bits(store_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(_config(store_folder, tmp_path / name))
    a, b = (load_file(tmp_path / name / "lorsa.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_torch_path_trains_as_the_reference(store_folder: Path, tmp_path: Path) -> None:
    results = [
        train(_config(store_folder, tmp_path / backend, backend=backend))
        for backend in ("torch", "reference")
    ]
    assert results[0].fvu == pytest.approx(results[1].fvu, abs=1e-3)


def test_a_stopped_run_goes_on_to_the_bit(store_folder: Path, tmp_path: Path) -> None:
    """Stopped after step 30, resumed from the checkpoint of step 26."""
    train(_config(store_folder, tmp_path / "whole"))
    config = _config(store_folder, tmp_path / "run", checkpoint_every_tokens=13 * 4 * N_CTX)
    with pytest.raises(Stop):
        train(config, report=_stop_at(30))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000000013", "step-000000026"]
    assert not (tmp_path / "run/lorsa.safetensors").exists()
    train(config)
    _same_weights_and_losses(tmp_path / "run", tmp_path / "whole")


CHILD = """
import json, sys
from pathlib import Path
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import StepReport
from lorsa.train.train import train

settings = json.loads(sys.argv[1])
settings |= {name: Path(settings[name]) for name in ("store", "out")}
settings["betas"] = tuple(settings["betas"])

def report(event):
    if isinstance(event, StepReport):
        print(event.step, flush=True)
        sys.stdin.readline()

train(TrainConfig(**settings), report=report)
"""


def test_a_killed_run_goes_on_to_the_bit(store_folder: Path, tmp_path: Path) -> None:
    train(_config(store_folder, tmp_path / "whole"))
    config = _config(store_folder, tmp_path / "run", checkpoint_every_tokens=4 * 4 * N_CTX)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(config.to_dict())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "10\n"
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "20\n"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert checkpoints(tmp_path / "run")
    train(config)
    _same_weights_and_losses(tmp_path / "run", tmp_path / "whole")


def _same_weights_and_losses(found: Path, expected: Path) -> None:
    a, b = (load_file(run / "lorsa.safetensors") for run in (found, expected))
    assert all(torch.equal(a[name], b[name]) for name in a)

    def losses(run: Path) -> list[tuple[int, float]]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    assert losses(found) == losses(expected)


def test_a_damaged_checkpoint_is_passed_over(store_folder: Path, tmp_path: Path) -> None:
    train(_config(store_folder, tmp_path / "whole"))
    config = _config(store_folder, tmp_path / "run", checkpoint_every_tokens=13 * 4 * N_CTX)
    with pytest.raises(Stop):
        train(config, report=_stop_at(30))
    (checkpoints(tmp_path / "run")[-1] / "optimizer.safetensors").write_bytes(b"x")
    said: list[Any] = []
    train(config, report=said.append)
    _about, passed, taken = said[:3]
    assert "step-000000026 is damaged" in passed
    assert "going on from" in taken
    assert "step-000000013" in taken
    _same_weights_and_losses(tmp_path / "run", tmp_path / "whole")


def test_an_interrupted_run_writes_a_checkpoint_and_goes_on(
    store_folder: Path, tmp_path: Path
) -> None:
    """Ctrl-C before the first checkpoint lost everything."""
    train(_config(store_folder, tmp_path / "whole"))
    config = _config(store_folder, tmp_path / "run")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(config.to_dict())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "10\n"
    child.send_signal(signal.SIGINT)
    child.communicate("\n")
    assert child.returncode == -signal.SIGINT
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000000011"]
    train(config)
    _same_weights_and_losses(tmp_path / "run", tmp_path / "whole")


def test_checkpoints_by_the_clock_and_the_two_newest_kept(
    store_folder: Path, tmp_path: Path
) -> None:
    config = _config(store_folder, tmp_path / "run", checkpoint_every_minutes=1e-9)
    with pytest.raises(Stop):
        train(config, report=_stop_at(40))
    names = [p.name for p in checkpoints(tmp_path / "run")]
    assert names == ["step-000000020", "step-000000030"]


def test_checkpoints_by_tokens_need_not_fit_the_steps(store_folder: Path, tmp_path: Path) -> None:
    every = 3 * 4 * N_CTX + 5
    config = _config(store_folder, tmp_path / "run", checkpoint_every_tokens=every)
    with pytest.raises(Stop):
        train(config, report=_stop_at(10))
    assert [p.name[-2:] for p in checkpoints(tmp_path / "run")] == ["04", "07"]


def test_two_at_once_on_one_folder_are_refused(store_folder: Path, tmp_path: Path) -> None:
    config = _config(store_folder, tmp_path / "run")
    refused: list[str] = []

    def report(event: Any) -> None:
        if isinstance(event, StepReport):
            with pytest.raises(TrainError) as error:
                train(config)
            refused.append(str(error.value))

    train(config, report=report)
    assert "is being written by another process" in refused[0]


def test_a_run_is_what_its_settings_say(store_folder: Path, tmp_path: Path) -> None:
    """Against a loop written by hand: order of data, schedules, clipping, Adam, dead heads."""
    n_steps, batch = 12, 4
    config = _config(
        store_folder,
        tmp_path / "run",
        train_tokens=n_steps * batch * N_CTX,
        top_k_start=3.0,
        grad_clip=0.02,
        betas=(0.8, 0.9),
        dead_window_tokens=2 * batch * N_CTX,
    )
    result = train(config)
    store = ActivationStore.open(store_folder)
    lorsa = Lorsa(shape_of(config, store))
    Initialiser(store).fill(lorsa, config)
    scales = scales_of(config, store)
    lorsa.rescale_(*scales)
    adam = torch.optim.Adam(lorsa.parameters(), betas=(0.8, 0.9), fused=True)
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=batch, seed=0)
    last = torch.zeros(lorsa.config.n_ov_heads)
    for step in range(n_steps):
        x, y = store.activations(attention_ports(1), sampler.batch(step))
        middle = (step + 0.5) / n_steps
        adam.param_groups[0]["lr"] = 1e-3 * min(1, middle / 0.05, (1 - middle) / 0.6)
        top_k = round(8 * (1 + 2 * max(0, 1 - step / (n_steps / 2))))
        acts, ids = lorsa.encode(x * scales.x, top_k=top_k)
        loss = (lorsa.decode(acts, ids) - y * scales.y).square().mean()
        adam.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(lorsa.parameters(), 0.02) > 0.02
        adam.step()
        last[ids[acts > 0].long()] = step + 1
    lorsa.rescale_(1 / scales.x, 1 / scales.y)
    found = Lorsa.from_pretrained(tmp_path / "run")
    for name, expected in lorsa.named_parameters():
        assert torch.allclose(getattr(found, name), expected, atol=1e-6), name
    assert result.dead_fraction == pytest.approx(float((last <= n_steps - 2).float().mean()))
    assert 0 < result.dead_fraction < 1


def test_only_damaged_checkpoints_are_named(store_folder: Path, tmp_path: Path) -> None:
    config = _config(store_folder, tmp_path / "run", checkpoint_every_tokens=13 * 4 * N_CTX)
    with pytest.raises(Stop):
        train(config, report=_stop_at(30))
    for folder in checkpoints(tmp_path / "run"):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="has only damaged checkpoints .* begin anew"):
        train(config)


def test_other_settings_in_the_same_folder_are_refused(store_folder: Path, tmp_path: Path) -> None:
    train(_config(store_folder, tmp_path / "run"))
    with pytest.raises(TrainError, match=r"holds another run \(top_k was 8, is 4\)"):
        train(_config(store_folder, tmp_path / "run", top_k=4))


def test_a_folder_with_other_things_is_refused(store_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(TrainError, match="holds other things"):
        train(_config(store_folder, tmp_path))


def test_a_loss_that_is_not_finite_stops_before_the_step(
    store_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TrainError, match=r"step \d+ \(sequences \d+.*\): loss is .*smaller --lr than 1e\+30"
    ):
        train(_config(store_folder, tmp_path / "run", lr=1e30))


def test_a_layer_that_is_not_stored_is_named(store_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="layer 0 is not in .*; it has layers 1-2"):
        train(_config(store_folder, tmp_path / "run", layer=0))
    assert not (tmp_path / "run").exists()


def test_bfloat16_arithmetic_comes_out_near_float32(store_folder: Path, tmp_path: Path) -> None:
    fvu = [
        train(_config(store_folder, tmp_path / precision, precision=precision)).fvu
        for precision in ("float32", "bfloat16")
    ]
    assert fvu[1] != fvu[0]
    assert fvu[1] == pytest.approx(fvu[0], abs=0.02)


@pytest.fixture
def two_processes(tmp_path: Path) -> TwoProcesses:
    """Train in two processes; their ports are free ones, which the launcher's store binds."""
    logs = tmp_path / "logs"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--log-dir", str(logs), "--redirects=2", "-m", "lorsa", "train"]

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(logs, ignore_errors=True)
        told = ""
        try:
            done = subprocess.run(
                [*command, *map(str, args)],
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "LORSA_DEBUG": "1"},
                timeout=300,
                check=False,
            )
        finally:  # pytest shows it last if the test fails, also because it took too long
            for path in sorted(logs.rglob("stderr.log")):
                told += f"rank {path.parent.name}:\n{path.read_text()}\n"
            print(told)
        done.stderr += told
        return done

    return run


def test_two_processes_make_the_lorsa_of_one(
    store_folder: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    one = train(_config(store_folder, tmp_path / "one"))
    (tmp_path / "run.toml").write_text(
        f"batch_tokens = {4 * N_CTX}\ntrain_tokens = {160 * N_CTX}\ninit_tokens = {16 * N_CTX}\n"
    )
    args = ["--store", store_folder, "--layer", 1, "--out", tmp_path / "two", "--device", "cpu"]
    args += ["--top-k", 8, "--config", tmp_path / "run.toml", "--json"]
    done = two_processes(*args)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)["runs"][0]
    assert two["fvu"] == pytest.approx(one.fvu, abs=1e-3)
    assert two["dead_fraction"] == pytest.approx(one.dead_fraction, abs=0.01)
    again = two_processes(*args)
    assert json.loads(again.stdout)["runs"][0] == two


@pytest.mark.parametrize("changes", [{"outputs": "derive"}, {"outputs": "derive", "dtype": "int8"}])
def test_a_smaller_store_trains_nearly_the_same_lorsa(
    harvest_config: HarvestConfig, store_folder: Path, tmp_path: Path, changes: dict[str, str]
) -> None:
    smaller = dataclasses.replace(harvest_config, store=tmp_path / "acts", **changes)
    harvest(smaller)
    whole = train(_config(store_folder, tmp_path / "whole"))
    result = train(_config(tmp_path / "acts", tmp_path / "run"))
    assert result.fvu == pytest.approx(whole.fvu, rel=0.05)
    seen = evaluate_run(EvalConfig(run=tmp_path / "run", store=tmp_path / "acts", device="cpu"))
    assert seen.fvu == pytest.approx(result.fvu, rel=1e-4)
    plain = evaluate_run(EvalConfig(run=tmp_path / "run", store=store_folder, device="cpu"))
    assert plain.fvu == pytest.approx(result.fvu, rel=0.05)


def test_a_run_does_not_fail_for_want_of_a_picture(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Path, result: object) -> Path:
        raise OSError("no room for a picture")

    monkeypatch.setattr("lorsa.train.report.reporting.draw_curves", fail)
    told: list[Any] = []
    train(_config(store_folder, tmp_path / "run"), report=told.append)
    assert "no picture of the curves: no room for a picture" in told
    assert Lorsa.from_pretrained(tmp_path / "run").config.layer == 1


def test_a_layer_with_nan_is_refused(store_folder: Path, tmp_path: Path) -> None:
    table = pq.read_table(store_folder / "shards.parquet")
    bad = pa.array([name == "layers/1/attn_in_norm" for name in table["array"].to_pylist()])
    column = table.schema.get_field_index("n_nonfinite")
    shutil.copytree(store_folder, tmp_path / "acts")
    table = table.set_column(column, "n_nonfinite", bad.cast(pa.int64()))
    edit_table(tmp_path / "acts", table)
    with pytest.raises(TrainError, match="layer 1 of .* tokens with NaN or Inf.* other --layers$"):
        train(_config(tmp_path / "acts", tmp_path / "run"))
    path = tmp_path / "acts/manifest.json"
    edit_manifest(path.parent, model=json.loads(path.read_text())["model"] | {"dtype": "float16"})
    with pytest.raises(TrainError, match="--model-dtype float32 into a new --store$"):
        train(_config(tmp_path / "acts", tmp_path / "run"))


def test_two_processes_that_cannot_begin_end_at_once(
    store_folder: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    (tmp_path / "layer-1").mkdir()
    (tmp_path / "layer-1" / "notes.txt").touch()
    done = two_processes("--store", store_folder, "--layer", 1, "--out", tmp_path)
    assert done.returncode != 0
    assert "holds other things" in done.stderr


def test_training_loads_no_language_model(store_folder: Path, tmp_path: Path) -> None:
    """transformers is for the harvest; training needs only the store."""
    code = (
        "import sys; from pathlib import Path\n"
        "from lorsa.train.config import TrainConfig\n"
        "from lorsa.train.train import train\n"
        f"train(TrainConfig(store=Path({str(store_folder)!r}), layer=1, top_k=8, "
        f"out=Path({str(tmp_path / 'run')!r}), batch_tokens=128, train_tokens=256, device='cpu'))\n"
        "assert not {'lorsa.harvest', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
