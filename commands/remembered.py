"""Settings that need not be typed again: the store and the language model of a run.

One rule holds for every command. The store is that of the run; where there is no run yet, it is
./acts. The language model is that of the run, where it is on this machine. What is filled in is
said in a line, and what is checked of a store or a model that was typed is checked of it too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import LorsaError, UsageError
from .options import Given

STORE_OF_RUN = {"store": "the run's"}
"""Default of a command that measures or reads a run, as its help shows it."""
MODEL_OF_RUN = {"model": "the run's, where it is on this machine; none leaves it out"}
NEEDED_MODEL = {"model": "the run's, where it is on this machine"}
Value = TypeVar("Value", str, str | None)
NONE = "none"
"""What is typed for no language model."""


def remember(
    given: Given, runs: Sequence[Path], *, store: bool = False, needs_model: bool = False
) -> Given:
    """Return settings with what was not typed as the runs have it, and say so in a line.

    Args:
        given: settings that were typed.
        runs: folders of the runs.
        store: whether a store is asked for too.
        needs_model: whether there must be a language model; else it is left out where it is not on
            this machine.

    Raises:
        LorsaError: a run's store is not where it was, or a model is needed and not here.
        UsageError: the runs are of several stores or models.
    """
    from ..display.bars import say
    from ..display.words import model_name
    from ..train.origin import store_of

    settings, told = dict(given), []
    if store and "store" not in given:
        settings["store"] = _same("store", store_of, runs)
        told.append(f"store {settings['store']}")
    if not needs_model and given.get("model", "").lower() == NONE:
        del settings["model"]
    elif "model" not in given and (model := _model(runs, needs_model)) is not None:
        settings["model"] = model
        told.append(f"model {model_name(model)}")
    if told:
        whose = f"{runs[0]} has it" if len(runs) == 1 else "the runs have it"
        say(f"not given, and so as {whose}: {', '.join(told)}")
    return settings


def _model(runs: Sequence[Path], needed: bool) -> str | None:
    """Return the language model of some runs as it can be typed; None, and a line, without one."""
    from ..display.bars import say
    from ..display.words import model_name
    from ..train.origin import model_at_hand, model_of

    name = _same("model", model_of, runs)
    if name is None:
        why, what_to_do = f"{runs[0]} names no language model", "give --model"
    elif (found := model_at_hand(runs[0])) is not None:
        return found
    else:
        why = f"the language model of {runs[0]}, {model_name(name)}, is not on this machine"
        what_to_do = f"give --model {name}" if name.count("/") == 1 else "give --model"
    if needed:
        raise LorsaError(f"{why}; {what_to_do}")
    if name is not None:
        say(f"{why}: what takes it is left out; for it, {what_to_do}")
    return None


def _same(what: str, of: Callable[[Path], Value], runs: Sequence[Path]) -> Value:
    """Return what all runs have; UsageError if they differ."""
    found = list(dict.fromkeys(of(run) for run in runs))
    if len(found) > 1:
        each = ", ".join(map(str, found))
        raise UsageError(f"the runs are of several {what}s ({each}); give --{what}")
    return found[0]
