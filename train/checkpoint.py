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
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model import CheckpointError, Lorsa
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


def save_checkpoint(
    run: Path, lorsa: Lorsa, optimizer: torch.optim.Optimizer, state: State, scales: Scales
) -> None:
    """Write a checkpoint and remove the older ones.

    Args:
        run: run folder.
        lorsa: in training, on scaled activations.
        optimizer: Adam over lorsa's parameters, in their order.
        state: where the run stands.
        scales: of the activations.
    """
    folder = run / FOLDER / f"step-{state.step:09d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
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
    os.replace(partial, folder)
    for old in checkpoints(run)[:-1]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    return sorted(p for p in (run / FOLDER).glob("step-*") if p.suffix != ".partial")


def load_checkpoint(
    folder: Path, lorsa: Lorsa, optimizer: torch.optim.Optimizer, scales: Scales
) -> State:
    """Put a run back to where a checkpoint was written.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another Lorsa.
    """
    saved = Lorsa.from_pretrained(folder)
    lorsa.load_state_dict(saved.state_dict())
    lorsa.rescale_(scales.x, scales.y)
    try:
        tensors = load_file(folder / OPTIMIZER)
        step = int(json.loads((folder / STATE).read_text("utf-8"))["step"])
        names = [name for name, _ in lorsa.named_parameters()]
        moments = {
            i: {key: tensors[f"{name}.{key}"] for key in ADAM_STATE} for i, name in enumerate(names)
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({error}); delete that folder to go on from an older checkpoint "
            "or from the start"
        ) from None
    return State(step, tensors["last_fired"].to(next(lorsa.parameters()).device))
