"""What a run's later commands trust is compared before it is believed."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.errors import AnalyzeError, CheckpointError, PublishError, TrainError
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push
from lorsa.seal import check_seal
from lorsa.train import checkpoint
from lorsa.train.checkpoint import checkpoints
from lorsa.train.config import TrainConfig
from lorsa.train.report.events import StepReport
from lorsa.train.train import train
from runs import STEP, settings
from unseal import unseal


class StopError(Exception):
    """Stands for whatever ends a process."""


def _config(store: Path, out: Path, **changes: Any) -> TrainConfig:
    few = {"train_tokens": 4 * STEP, "checkpoint_every_tokens": STEP}
    return TrainConfig(**settings(store, **few | changes), out=out)


@pytest.fixture(scope="module")
def finished(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "layer-1"
    train(_config(store_folder, run))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def half(store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("lorsa.train.group.LOG_EVERY_STEPS", 1)

    def stop(event: object) -> None:
        if isinstance(event, StepReport) and event.step == 3:
            raise StopError

    with pytest.raises(StopError):
        train(_config(store_folder, tmp_path / "half"), report=stop)
    return tmp_path / "half"


def _change(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "config.json", "lorsa.safetensors"])
def test_a_changed_byte_of_a_finished_run_is_named(
    store_folder: Path, run: Path, name: str
) -> None:
    """Another FVU, top_k or corpus in run.json was taken for what the run had."""
    data = bytearray((run / name).read_bytes())
    data[data.index(b"2") if name != "lorsa.safetensors" else -1] ^= 1
    (run / name).write_bytes(data)
    with pytest.raises(TrainError, match=f"{run / name} is damaged .*restore it from a copy"):
        train(_config(store_folder, run))


def test_changed_figures_are_not_passed_on(store_folder: Path, run: Path, tmp_path: Path) -> None:
    """A flipped bit of run.json came out in the model card, and in analysis.json."""
    fvu = str(json.loads((run / "run.json").read_text())["result"]["fvu"])
    _change(run / "run.json", f'"fvu": {fvu}', f'"fvu": {"1" if fvu[0] == "0" else "0"}{fvu[1:]}')
    with pytest.raises(PublishError, match=r"run.json is damaged \(its checksum is wrong\)"):
        push(PushConfig(runs=(run,), repo=str(tmp_path / "shared")))
    with pytest.raises(AnalyzeError, match=r"run.json is damaged \(its checksum is wrong\)"):
        analyze_run(AnalyzeConfig(run=run, store=store_folder, tokens=64, device="cpu"))


def test_the_run_json_of_another_run_is_not_taken(
    store_folder: Path, run: Path, tmp_path: Path
) -> None:
    """Whole by itself, it gave the weights the figures of others."""
    train(_config(store_folder, tmp_path / "other", seed=1))
    shutil.copy(tmp_path / "other/run.json", run / "run.json")
    with pytest.raises(PublishError, match="run.json"):
        push(PushConfig(runs=(run,), repo=str(tmp_path / "shared")))


def test_a_run_of_an_earlier_version_is_as_it_was(
    store_folder: Path, run: Path, tmp_path: Path
) -> None:
    unseal(run)
    told: list[Any] = []
    train(_config(store_folder, run), report=told.append)
    assert f"{run} is already finished" in told
    push(PushConfig(runs=(run,), repo=str(tmp_path / "shared")))


def test_settings_of_half_a_run_are_compared(store_folder: Path, half: Path) -> None:
    """Another corpus in run.json of half a run came out in its model card."""
    _change(half / "run.json", '"packing": "pack"', '"packing": "tack"')
    with pytest.raises(TrainError, match=r"run.json is damaged \(its checksum is wrong\)"):
        train(_config(store_folder, half))


def test_a_damaged_line_of_metrics_is_left_out_and_told(store_folder: Path, half: Path) -> None:
    """A loss with a flipped bit stayed in the curve; a line that was no JSON left it in silence."""
    lines = (half / "metrics.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '"loss"' in line)
    lines[first] = lines[first].replace('"loss": ', '"loss": 1')
    (half / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    told: list[Any] = []
    train(_config(store_folder, half), report=told.append)
    assert f"{half / 'metrics.jsonl'}: left out damaged lines, {first + 1}" in told
    assert len((half / "metrics.jsonl").read_text().splitlines()) >= len(lines) - 1


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(
    store_folder: Path, half: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Too many open files, and the newest checkpoints were called damaged and removed."""
    newest = checkpoints(half)[-1]
    real = checkpoint.file_crc32

    def refuse(path: Path) -> int:
        if path.parent == newest:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "file_crc32", refuse)
    with pytest.raises(CheckpointError, match=f"{newest}.* cannot be read .{os.strerror(number)}"):
        train(_config(store_folder, half))
    assert checkpoints(half)[-1] == newest


def test_a_damaged_checkpoint_is_put_aside(store_folder: Path, half: Path) -> None:
    """It was removed, though whoever has a copy of one of its files could have mended it."""
    newest = checkpoints(half)[-1]
    (newest / "state.json").write_text("{")
    asked = _config(store_folder, half, checkpoint_every_tokens=None)
    seen: list[str] = []

    def look(event: object) -> None:
        if isinstance(event, StepReport):
            seen.extend(path.name for path in newest.parent.iterdir())

    train(asked, report=look)
    assert f"damaged-{newest.name}" in seen


def test_a_run_killed_at_its_end_is_finished_by_the_same_command(
    store_folder: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the seal and run.json the run is not finished, and its seal is not believed."""

    def killed(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("lorsa.train.run_folder.write_json", killed)
        with pytest.raises(StopError):
            train(_config(store_folder, half))
    assert (half / "seal.json").exists()
    result = train(_config(store_folder, half))
    assert json.loads((half / "run.json").read_text())["result"]["fvu"] == result.fvu
    assert not (half / "checkpoints").exists()


def test_a_run_killed_at_its_beginning_begins_anew(store_folder: Path, tmp_path: Path) -> None:
    """Before run.json had its name, the folder was said to hold other things."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json.partial").write_text('{"form')
    train(_config(store_folder, tmp_path / "run"))
    assert check_seal(tmp_path / "run") == []
    assert not (tmp_path / "run/run.json.partial").exists()
