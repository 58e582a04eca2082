"""What bounds a run: memory, minutes, the data that there is."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import TrainError
from lorsa.store.read.reader import ActivationStore
from lorsa.train.checkpoint import checkpoints
from lorsa.train.config import TrainConfig
from lorsa.train.extent import extent, require_room, run_bytes
from lorsa.train.report.events import StepReport
from lorsa.train.shape import shape_of
from lorsa.train.train import train
from runs import STEP, config
from small import edit_manifest
from tiny import N_CTX
from unseal import change_json


def _config(store: Path, out: Path, **changes: Any) -> TrainConfig:
    return config(store, out, changes)


@pytest.mark.parametrize("n_seqs", [1, 2, 3])
def test_micro_batches_add_up_to_the_step(store_folder: Path, tmp_path: Path, n_seqs: int) -> None:
    """Of 4 sequences in parts of 1, 2, and 3 (which makes two parts)."""
    train(_config(store_folder, tmp_path / "whole"))
    train(_config(store_folder, tmp_path / "parts", micro_batch_tokens=n_seqs * N_CTX))
    whole, parts = (Lorsa.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for name, expected in whole.named_parameters():
        assert torch.allclose(getattr(parts, name), expected, atol=1e-4), name


def test_micro_batches_of_masked_tokens_add_up_too(store_folder: Path, tmp_path: Path) -> None:
    """Parts in which fewer tokens count weigh less."""
    mask = {"loss_mask": "norm>1.1x"}
    train(_config(store_folder, tmp_path / "whole", **mask))
    train(_config(store_folder, tmp_path / "parts", micro_batch_tokens=N_CTX, **mask))
    whole, parts = (Lorsa.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for name, expected in whole.named_parameters():
        assert torch.allclose(getattr(parts, name), expected, atol=1e-4), name


def test_a_run_keeps_to_its_minutes(store_folder: Path, tmp_path: Path) -> None:
    """More steps than one pass has, laid out so that the learning rate ends at 0."""
    reports: list[StepReport] = []

    def report(event: Any) -> None:
        if isinstance(event, StepReport):
            reports.append(event)

    started = time.monotonic()
    config = _config(store_folder, tmp_path / "run", train_tokens=None, minutes=4 / 60)
    result = train(config, report=report)
    assert time.monotonic() - started > 2
    assert result.train_tokens == reports[-1].tokens == reports[-1].train_tokens
    assert reports[-1].lr < 0.1 * config.lr
    decay = [r.train_tokens for r in reports if r.tokens > 0.9 * result.train_tokens]
    assert len(set(decay)) == 1  # fixed once the learning rate falls


def test_minutes_hold_where_the_rate_falls_from_the_start(
    store_folder: Path, tmp_path: Path
) -> None:
    """Nothing was planned once the learning rate fell; with this decay it always falls."""
    config = _config(
        store_folder, tmp_path / "run", train_tokens=None, minutes=2 / 60, decay_frac=1.0
    )
    assert train(config).train_tokens < 1000 * STEP


def test_minutes_do_not_go_beyond_the_tokens_asked_for(store_folder: Path, tmp_path: Path) -> None:
    config = _config(store_folder, tmp_path / "run", train_tokens=12 * STEP, minutes=10)
    assert train(config).train_tokens == 12 * STEP


def test_a_run_by_the_minute_goes_on_with_the_time_it_has_left(
    store_folder: Path, tmp_path: Path
) -> None:
    config = _config(
        store_folder,
        tmp_path / "run",
        train_tokens=None,
        minutes=3 / 60,
        checkpoint_every_tokens=4 * STEP,
    )

    class Stop(Exception):  # noqa: N818
        pass

    def stop(event: Any) -> None:
        if isinstance(event, StepReport) and event.step == 20:
            raise Stop

    with pytest.raises(Stop):
        train(config, report=stop)
    state = json.loads((checkpoints(config.out)[-1] / "state.json").read_text())
    assert state["spent_s"] > 0
    assert state["n_steps"] > state["step"]
    assert train(config).train_tokens > 20 * STEP


def test_too_little_memory_says_what_fits(store: ActivationStore) -> None:
    config = _config(Path(str(store.root)), Path("o"), n_ov_heads=4096, n_qk_heads=16)
    shape = shape_of(config, store)
    span = extent(config, store, 1)
    needed = run_bytes(shape, span, 1)
    require_room(shape, span, world=1, free=10 * needed + 1_000_000_000)
    in_parts = run_bytes(shape, span._replace(n_micro=4), 1)
    free = int(((needed + in_parts) / 2 + 300_000_000) / 0.92)
    with pytest.raises(TrainError, match=r"needs about .* GB, .* GB are free; what fits: --micro"):
        require_room(shape, span, world=1, free=free)
    free = int((in_parts / 2 + 300_000_000) / 0.92)
    with pytest.raises(TrainError, match=r"what fits: --n-ov-heads \d+ --micro-batch-tokens"):
        require_room(shape, span, world=1, free=free)
    with pytest.raises(TrainError, match="nothing smaller fits either; free some memory"):
        require_room(shape, span, world=1, free=1000)


def test_a_gate_needs_memory_besides(store: ActivationStore) -> None:
    """Of every head at every token in float32: its logit, itself, and the gradients of both."""
    config = _config(Path(str(store.root)), Path("o"), n_ov_heads=4096, n_qk_heads=16)
    plain, span = shape_of(config, store), extent(config, store, 1)
    gated = dataclasses.replace(plain, gate="sigmoid")
    weights = (plain.d_model + 1) * 4096 * span.state_bytes
    more = run_bytes(gated, span, 1) - run_bytes(plain, span, 1)
    assert more - weights == span.step_tokens * 4 * 4 * 4096


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorsa.train.train.free_memory_bytes", lambda _: 1000)
    with pytest.raises(TrainError, match=r"0\.\d+ GB, 1e-06 GB are free"):
        train(_config(store_folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_store_without_training_shards_is_refused(store_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(store_folder, tmp_path / "acts")
    n_shards = ActivationStore.open(store_folder).manifest.n_shards
    edit_manifest(tmp_path / "acts", held_out_shards=list(range(n_shards)))
    with pytest.raises(TrainError, match="has 0 training sequences .*harvest more"):
        train(_config(tmp_path / "acts", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_a_store_of_another_width(
    store_folder: Path, tmp_path: Path
) -> None:
    config = _config(store_folder, tmp_path / "run")
    train(config)
    path = tmp_path / "run" / "run.json"
    decisive = json.loads(path.read_text())["decisive"]
    change_json(path, decisive=decisive | {"store_uuid": "another", "d_model": 48})
    (path.parent / "seal.json").unlink()
    with pytest.raises(TrainError, match="store_uuid was 'another', is .*d_model was 48, is 32"):
        train(config)
