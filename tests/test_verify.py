"""One verb finds what is wrong with all that is written, names it, and finds nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lorsa import cli
from lorsa.analyze.explanations import Record
from lorsa.errors import LorsaError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import StepReport
from lorsa.train.sweep import grid, points, sweep, write_sweep
from lorsa.train.train import train
from lorsa.verify import verify_paths
from lorsa.view.build import build_page
from runs import STEP, settings
from typer.testing import CliRunner
from unseal import unseal

from reading import make_analysis

FEW = {"train_tokens": 2 * STEP, "n_ov_heads": 32}


class StopError(Exception):
    """Stands for whatever ends a process."""


def _stop(event: object) -> None:
    if isinstance(event, StepReport):
        raise StopError


@pytest.fixture(scope="module")
def everything(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each thing."""
    root = tmp_path_factory.mktemp("all")
    shutil.copytree(store_folder, root / "acts")
    run = root / "runs/layer-1"
    train(TrainConfig(**settings(store_folder, **FEW), out=run))
    evaluate_run(EvalConfig(run=run, store=store_folder, device="cpu"))
    make_analysis(run / "analysis")
    with Record(run / "analysis/explanations.jsonl") as record:
        record.add({"head": 3, "text": "the"})
    build_page(run)
    push(PushConfig(runs=(run,), repo=str(root / "shared")))
    base = settings(store_folder, **FEW)
    write_sweep(sweep(points(base, grid({"top_k": [4]}), root / "sweep"), root / "sweep"))
    half = TrainConfig(**settings(store_folder, checkpoint_every_tokens=STEP), out=root / "x/half")
    with pytest.raises(StopError):
        train(half, report=_stop)
    shutil.copytree(run / "page", root / "x/page-of-before")
    return root


def _flip(path: Path, byte: int = -2) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_all_that_is_written_is_whole(everything: Path) -> None:
    found = verify_paths([everything], full=True)
    assert found["ok"]
    assert found["problems"] == []
    kinds = {(Path(each["path"]).name, each["kind"]) for each in found["found"]}
    assert kinds == {
        ("acts", "store"),
        ("layer-1", "run"),
        ("analysis", "analysis"),
        ("page", "page"),
        ("page-of-before", "page"),
        ("layer-1", "Lorsa"),
        ("top_k=4", "run"),
        ("sweep", "sweep"),
        ("half", "run"),
    }
    assert all(each["sealed"] for each in found["found"])
    (half,) = [each for each in found["found"] if not each["finished"]]
    assert half["path"].endswith("half")


@pytest.mark.parametrize(
    "name",
    [
        "acts/layers/1/attn_in/c/0/0/0",
        "runs/layer-1/run.json",
        "runs/layer-1/eval.json",
        "runs/layer-1/metrics.jsonl",
        "runs/layer-1/lorsa.safetensors",
        "runs/layer-1/seal.json",
        "runs/layer-1/analysis/heads.parquet",
        "runs/layer-1/analysis/explanations.jsonl",
        "runs/layer-1/page/index.html",
        "runs/layer-1/page/page-*/data-index.js",
        "shared/layer-1/training.json",
        "sweep/sweep.csv",
        "x/half/run.json",
        "x/half/metrics.jsonl",
        "x/half/checkpoints/step-*/optimizer.safetensors",
    ],
)
def test_a_flipped_bit_of_anything_is_named(everything: Path, tmp_path: Path, name: str) -> None:
    """There was no verb but that of stores: a run, a page, an analysis could not be asked."""
    top = tmp_path / name.split("/")[0]
    shutil.copytree(everything / top.name, top)
    path = next(tmp_path.glob(name))
    _flip(path, -3)
    result = CliRunner().invoke(cli.app, ["verify", str(top), "--full", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["ok"]
    (problem,) = found["problems"]
    assert str(path) in problem or str(path.parent) in problem
    assert sum(bool(each["problems"]) for each in found["found"]) == 1


def test_what_is_missing_is_named(everything: Path, tmp_path: Path) -> None:
    shutil.copytree(everything / "runs", tmp_path / "runs")
    run = tmp_path / "runs/layer-1"
    (run / "lorsa.safetensors").unlink()
    (run / "analysis/tokens.parquet").unlink()
    next(run.glob("page/page-*/app.js")).unlink()
    told = CliRunner().invoke(cli.app, ["verify", str(run)]).stdout.splitlines()
    assert [line.rpartition(" ")[2] for line in told] == ["missing", "damaged"] * 3


def test_what_an_earlier_version_wrote_is_said_to_be_that(everything: Path, tmp_path: Path) -> None:
    """It has no checksums, so none can say that it is whole; what can be is read."""
    shutil.copytree(everything / "runs", tmp_path / "runs")
    run = tmp_path / "runs/layer-1"
    unseal(run)
    unseal(run / "analysis")
    told = CliRunner().invoke(cli.app, ["verify", str(run)])
    assert told.exit_code == 0
    assert told.stdout.count("an earlier version made it") == 2
    _flip(run / "lorsa.safetensors")
    _flip(run / "analysis/heads.parquet", 5)
    problems = verify_paths([run])["problems"]
    assert len(problems) == 2
    assert f"{run / 'lorsa.safetensors'} is damaged" in problems[0]
    assert f"{run / 'analysis/heads.parquet'} cannot be read" in problems[1]


def test_what_cannot_be_read_is_not_called_damaged(
    everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(24, "Too many open files", "x")

    monkeypatch.setattr("lorsa.seal._facts", refuse)
    problems = verify_paths([everything / "runs"])["problems"]
    assert problems
    assert all("cannot be read (Too many open files)" in line for line in problems)


def test_a_folder_with_nothing_of_ours_is_said(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")  # a language model's
    with pytest.raises(LorsaError, match="holds nothing to verify; give a store"):
        verify_paths([tmp_path])
    with pytest.raises(LorsaError, match="nowhere holds nothing to verify"):
        verify_paths([tmp_path / "nowhere"])
