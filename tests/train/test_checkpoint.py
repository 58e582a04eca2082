"""Checkpoints that a disk has damaged are passed over, and said; what is left is not guessed at."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import CheckpointError
from lorsa.train.checkpoint import checkpoints, load_checkpoint, load_newest_checkpoint
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import StepReport
from lorsa.train.train import train
from tiny import N_CTX

STEP_TOKENS = 4 * N_CTX


class Stop(Exception):  # noqa: N818
    """Ends a run from outside."""


@pytest.fixture(scope="module")
def stopped(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped with checkpoints of its steps 3, 6 and 9."""
    out = tmp_path_factory.mktemp("stopped") / "run"

    def report(event: Any) -> None:
        if isinstance(event, StepReport) and event.step == 10:
            raise Stop

    with pytest.raises(Stop):
        train(_config(store_folder, out), report=report)
    return out


def _config(store: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        store=store,
        layer=1,
        out=out,
        top_k=8,
        batch_tokens=STEP_TOKENS,
        train_tokens=12 * STEP_TOKENS,
        eval_tokens=N_CTX,
        init_tokens=16 * N_CTX,
        checkpoint_every_tokens=3 * STEP_TOKENS,
        keep_checkpoints=3,
        device="cpu",
    )


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """That run, to be damaged."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def _other_step(path: Path) -> None:
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"step": facts["step"] + 1}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("lorsa.safetensors", _truncate),
        ("lorsa.safetensors", _flip),
        ("optimizer.safetensors", _truncate),
        ("optimizer.safetensors", _flip),
        ("config.json", _truncate),
        ("config.json", Path.unlink),
        ("state.json", Path.unlink),
        ("state.json", _truncate),
        ("state.json", _other_step),
        ("state.json", lambda path: path.write_text("[]")),
    ],
)
def test_damage_of_every_file_is_found(run: Path, name: str, damage: Callable[[Path], Any]) -> None:
    """A flipped byte of a weight or a moment went unseen."""
    newest = checkpoints(run)[-1]
    damage(newest / name)
    with pytest.raises(CheckpointError, match="step-000000009 is damaged"):
        load_checkpoint(newest)
    told: list[str] = []
    loaded = load_newest_checkpoint(run, told.append)
    assert loaded is not None
    assert loaded.state.step == 6
    assert "passed over: " in told[0]
    assert [folder.name for folder in checkpoints(run)] == ["step-000000003", "step-000000006"]


def test_one_that_was_being_written_does_not_count(run: Path, store_folder: Path) -> None:
    newest = checkpoints(run)[-1]
    newest.rename(newest.with_name(newest.name + ".partial"))
    assert [folder.name for folder in checkpoints(run)] == ["step-000000003", "step-000000006"]
    train(_config(store_folder, run))
    assert not (run / "checkpoints").exists()


def test_a_checkpoint_holds_all_of_adam_and_is_a_lorsa(run: Path) -> None:
    loaded = load_checkpoint(checkpoints(run)[-1])
    names = [name for name, _ in loaded.dictionary.named_parameters()]
    expected = {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert loaded.moments.keys() == expected
    assert loaded.state.last_fired.dtype == torch.int64
    assert Lorsa.from_pretrained(checkpoints(run)[-1]).config == loaded.dictionary.config


def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path, print) is None
