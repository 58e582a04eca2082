"""Checkpoints of a run in progress: all that the next step depends on, in safetensors and JSON.

    checkpoints/step-000000512/
      config.json, lorsa.safetensors   a Lorsa like any other, for raw activations
      optimizer.safetensors            Adam's moments, when each head last fired
      state.json                       steps done, of how many, in what time

A checkpoint is written into a folder named *.partial and renamed when it is whole, so what has its
final name can be trusted. Weights are stored for raw activations; the scales of training are
powers of two, so they come back to the bit.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model import CheckpointError, Lorsa
from ..store import sync_tree
from .setup import Scales

FOLDER = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class State(NamedTuple):
    """Where a run stands between two steps."""

    step: int
    """Steps done"""
    last_fired: Tensor
    """Steps done when each head last fired, int64, [n_ov_heads]"""
    n_steps: int | None = None
    """Steps of the whole run, where its minutes decide them"""
    spent_s: float = 0.0
    """Time that it took so far"""


def save_checkpoint(
    run: Path,
    lorsa: Lorsa,
    optimizer: torch.optim.Optimizer,
    state: State,
    scales: Scales,
    *,
    keep: int = 2,
) -> None:
    """Write a checkpoint and remove all but the newest.

    Args:
        run: run folder.
        lorsa: in training, on scaled activations.
        optimizer: Adam over lorsa's parameters, in their order.
        state: where the run stands.
        scales: of the activations.
        keep: how many stay.

    Raises:
        CheckpointError: the disk does not take it.
    """
    folder = checkpoint_folder(run, state.step)
    for stale in (run / FOLDER).glob("*.partial"):
        shutil.rmtree(stale)
    try:
        _write(folder, lorsa, optimizer, state, scales)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
        raise CheckpointError(
            f"{folder} cannot be written ({error}); make room and run the same command again"
        ) from None
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def _write(
    folder: Path, lorsa: Lorsa, optimizer: torch.optim.Optimizer, state: State, scales: Scales
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    lorsa.rescale_(1 / scales.x, 1 / scales.y)
    try:
        lorsa.save_pretrained(partial)
    finally:
        lorsa.rescale_(scales.x, scales.y)
    tensors = {"last_fired": state.last_fired.cpu()}
    for name, parameter in lorsa.named_parameters():
        for key in ADAM_STATE:
            tensors[f"{name}.{key}"] = optimizer.state[parameter][key].detach().cpu().contiguous()
    save_file(tensors, partial / OPTIMIZER)
    (partial / STATE).write_text(json.dumps(_facts(state)) + "\n", "utf-8")
    sync_tree(partial)
    os.replace(partial, folder)


def _facts(state: State) -> dict[str, int | float | None]:
    return {"step": state.step, "n_steps": state.n_steps, "spent_s": state.spent_s}


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run / FOLDER / f"step-{step:09d}"


def checkpoints(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    return sorted(p for p in (run / FOLDER).glob("step-*") if p.suffix != ".partial")


def load_newest_checkpoint(
    run: Path,
    lorsa: Lorsa,
    optimizer: torch.optim.Optimizer,
    scales: Scales,
    report: Callable[[str], None],
) -> State | None:
    """Put a run back to where its newest good checkpoint was written; None if it has none at all.

    Newer ones, which are damaged, are removed.

    Raises:
        CheckpointError: it has checkpoints, and all are damaged.
    """
    found = checkpoints(run)
    damaged: list[Path] = []
    for folder in reversed(found):
        try:
            state = load_checkpoint(folder, lorsa, optimizer, scales)
        except CheckpointError as error:
            report(f"passed over: {error}")
            damaged.append(folder)
        else:
            report(f"going on from {folder}")
            for other in damaged:
                shutil.rmtree(other)
            return state
    if found:
        raise CheckpointError(
            f"{run / FOLDER} has only damaged checkpoints; delete {run} to begin anew"
        )
    return None


def load_checkpoint(
    folder: Path, lorsa: Lorsa, optimizer: torch.optim.Optimizer, scales: Scales
) -> State:
    """Put a run back to where a checkpoint was written; CheckpointError if it is damaged."""
    try:
        saved = Lorsa.from_pretrained(folder)
        tensors = load_file(folder / OPTIMIZER)
        facts = json.loads((folder / STATE).read_text("utf-8"))
        step, n_steps = int(facts["step"]), facts.get("n_steps")
        spent_s = float(facts.get("spent_s", 0.0))
        names = [name for name, _ in lorsa.named_parameters()]
        moments = {
            i: {key: tensors[f"{name}.{key}"] for key in ADAM_STATE} for i, name in enumerate(names)
        }
        last_fired = tensors["last_fired"].to(next(lorsa.parameters()).device)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from None
    lorsa.load_state_dict(saved.state_dict())
    lorsa.rescale_(scales.x, scales.y)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return State(step, last_fired, n_steps, spent_s)
