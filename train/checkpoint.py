"""Checkpoints of a run: all that its next step depends on, in safetensors and JSON.

    checkpoints/step-000000512/
      config.json, lorsa.safetensors   a dictionary like any other, for raw activations
      optimizer.safetensors            Adam's moments, when each feature last fired
      state.json                       steps done, of how many, in what time; checksums

A checkpoint is written into a folder named *.partial and renamed when it is whole; checksums
detect what a disk does to it afterwards. Weights are stored for raw activations; the scales of
training are powers of two, so they come back to the bit.
"""

import errno
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..dictionaries.choices import CONFIG, WEIGHTS
from ..dictionaries.config import DictionaryConfig
from ..dictionaries.dictionary import Dictionary
from ..dictionaries.kinds import KINDS, load
from ..errors import CheckpointError, unreadable
from ..reading import read_json
from ..whole import file_crc32, whole
from .learner import Whole
from .start import Scales

CHECKPOINTS = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


class State(NamedTuple):
    """Progress of a run between two steps."""

    step: int
    """Steps done"""
    last_fired: Tensor
    """Steps done when each feature last fired, int64, [n_features]"""
    n_steps: int | None = None
    """Steps of the whole run, where its minutes decide them"""
    spent_s: float = 0.0
    """Seconds that the run took so far"""


class Restored(NamedTuple):
    """Contents of a checkpoint, on the CPU."""

    dictionary: Dictionary
    """Dictionary for raw activations"""
    moments: dict[str, Tensor]
    """Moments of Adam, by the parameter's name and their own, as W_Q.exp_avg"""
    state: State


def save_checkpoint(
    run: Path,
    shape: DictionaryConfig,
    learned: Whole,
    state: State,
    scales: Scales,
    *,
    keep: int = 2,
) -> None:
    """Write a checkpoint and remove all but the newest.

    Args:
        run: run folder.
        shape: shape of the dictionary.
        learned: the dictionary in training, on scaled activations, and its moments.
        state: progress of the run.
        scales: scales of the activations.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk does not take it.
    """
    folder = checkpoint_folder(run, state.step)
    for stale in (run / CHECKPOINTS).glob("*.partial"):
        shutil.rmtree(stale)
    try:
        _write(folder, shape, learned, state, scales)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error}); make room and run the same command again"
        ) from None
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def _write(
    folder: Path, shape: DictionaryConfig, learned: Whole, state: State, scales: Scales
) -> None:
    tensors = {"last_fired": state.last_fired.cpu(), **learned.moments}
    facts = {"step": state.step, "n_steps": state.n_steps, "spent_s": state.spent_s}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder) as partial:
        partial.mkdir()
        raw_dictionary(shape, learned, scales).save_pretrained(partial)
        save_file(tensors, partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps(_sealed(facts, partial)) + "\n", "utf-8")


def raw_dictionary(shape: DictionaryConfig, learned: Whole, scales: Scales) -> Dictionary:
    """Return the dictionary of a run, for raw activations, on the CPU."""
    dictionary = KINDS[shape.kind](shape)
    dictionary.load_state_dict(learned.weights)
    return dictionary.rescale_(1 / scales.x, 1 / scales.y)


def _sealed(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return facts with checksums of the files beside them and of themselves."""
    sums = {name: file_crc32(folder / name) for name in (CONFIG, WEIGHTS, OPTIMIZER)}
    return facts | {"crc32": sums | {STATE: zlib.crc32(json.dumps(facts).encode())}}


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / CHECKPOINTS / f"step-{step:09d}"


def checkpoints(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    return sorted(p for p in (run / CHECKPOINTS).glob("step-*") if p.suffix != ".partial")


def load_newest_checkpoint(run: Path, report: Callable[[str], None]) -> Restored | None:
    """Read the newest good checkpoint of a run; None if there is no checkpoint.

    Newer ones, which are damaged, are put aside as damaged-step-000000512.

    Args:
        run: run folder.
        report: receives a line for each checkpoint that is passed over or resumed from.

    Raises:
        CheckpointError: it has checkpoints, and all are damaged, or one cannot be read.
    """
    found = checkpoints(run)
    damaged: list[Path] = []
    for folder in reversed(found):
        try:
            restored = load_checkpoint(folder)
        except CheckpointError as error:
            report(f"passed over: {error}")
            damaged.append(folder)
        except OSError as error:
            raise CheckpointError(unreadable(folder, error)) from None
        else:
            report(f"going on from {folder}")
            for other in damaged:
                _put_aside(other)
            return restored
    if found:
        raise CheckpointError(
            f"{run / CHECKPOINTS} has only damaged checkpoints ({damaged[0]} and older); restore "
            "one from a copy, or begin anew in another folder by --out"
        )
    return None


def _put_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, whose place another takes; one of before makes room."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def load_checkpoint(folder: Path) -> Restored:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is damaged.
        OSError: a file is there and cannot be read, which says nothing of its content.
    """
    try:
        facts = read_json(folder / STATE)
        sealed = facts.pop("crc32")
        if sealed != _sealed(facts, folder)["crc32"]:
            raise ValueError("a checksum is wrong")
        dictionary = load(folder)
        moments = load_file(folder / OPTIMIZER)
        last_fired = moments.pop("last_fired")
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise
        raise CheckpointError(f"{folder} is damaged ({error})") from None
    state = State(facts["step"], last_fired, facts["n_steps"], facts["spent_s"])
    return Restored(dictionary, moments, state)
