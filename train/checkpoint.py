"""Checkpoints of a run in progress: all that the next step depends on, in safetensors and JSON.

    checkpoints/step-000000512/
      config.json, lorsa.safetensors   a Lorsa like any other, for raw activations
      optimizer.safetensors            Adam's moments, when each head last fired
      state.json                       steps done

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
KEPT = 2
"""Checkpoints that are kept, in case the newest is damaged."""
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class State(NamedTuple):
    """Where a run stands between two steps."""

    step: int
    """Steps done"""
    last_fired: Tensor
    """Steps done when each head last fired, int64, [n_ov_heads]"""


def save_checkpoint(
    run: Path, lorsa: Lorsa, optimizer: torch.optim.Optimizer, state: State, scales: Scales
) -> None:
    """Write a checkpoint and remove those before the last one.

    Args:
        run: run folder.
        lorsa: in training, on scaled activations.
        optimizer: Adam over lorsa's parameters, in their order.
        state: where the run stands.
        scales: of the activations.
    """
    folder = run / FOLDER / f"step-{state.step:09d}"
    for stale in (run / FOLDER).glob("*.partial"):
        shutil.rmtree(stale)
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
    (partial / STATE).write_text(json.dumps({"step": state.step}) + "\n", "utf-8")
    sync_tree(partial)
    if folder.exists():  # damaged: the run went on from an older one
        shutil.rmtree(folder)
    os.replace(partial, folder)
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)


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

    Raises:
        CheckpointError: it has checkpoints, and all are damaged.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            state = _load(folder, lorsa, optimizer, scales)
        except CheckpointError as error:
            report(f"passed over: {error}")
        else:
            report(f"going on from {folder}")
            return state
    if found:
        raise CheckpointError(
            f"{run / FOLDER} has only damaged checkpoints; delete {run} to begin anew"
        )
    return None


def _load(folder: Path, lorsa: Lorsa, optimizer: torch.optim.Optimizer, scales: Scales) -> State:
    try:
        saved = Lorsa.from_pretrained(folder)
        tensors = load_file(folder / OPTIMIZER)
        step = int(json.loads((folder / STATE).read_text("utf-8"))["step"])
        names = [name for name, _ in lorsa.named_parameters()]
        moments = {
            i: {key: tensors[f"{name}.{key}"] for key in ADAM_STATE} for i, name in enumerate(names)
        }
        last_fired = tensors["last_fired"].to(next(lorsa.parameters()).device)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from None
    lorsa.load_state_dict(saved.state_dict())
    lorsa.rescale_(scales.x, scales.y)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return State(step, last_fired)
