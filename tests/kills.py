"""Kills: commands that are killed at any moment, and then typed again, end as if they were not.

A kill is by SIGKILL: half of them before an operation on a file, drawn among all that the command
does, and half at a moment drawn from the time that it takes.
"""

import os
import random
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from drills import (
    STEP,
    analyze_config,
    eval_config,
    explain_config,
    folder_digest,
    harvest_config,
    quick,
    train_config,
)
from lorsa.analyze.explain.explain import explain
from lorsa.analyze.features import analyze_run
from lorsa.errors import LorsaError
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.exchange.config import ConvertConfig
from lorsa.exchange.convert import convert
from lorsa.harvest.harvest import harvest
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push
from lorsa.store.care.merge import merge_stores
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.train.sweep import grid, points, sweep, write_sweep
from lorsa.train.train import train
from lorsa.verify import verify_paths
from lorsa.view.build import build_page

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.replace"}
WRITES = os.O_WRONLY | os.O_RDWR
ENDPOINT = "http://127.0.0.1:9/v1"
Work = Callable[[Path, Path], Any]


class Command(NamedTuple):
    """A command that is killed."""

    before: tuple[tuple[str, str], ...]
    """What lies in its folder when it begins: from the prepared folder, and under which name"""
    work: Work
    """The command, from the prepared folder and its own"""


def _train(root: Path, own: Path) -> None:
    train(train_config(root, own / "layer-1", checkpoint_every_tokens=2 * STEP))


def _sweep(root: Path, own: Path) -> None:
    config = train_config(root, own / "x", checkpoint_every_tokens=2 * STEP)
    base = {name: getattr(config, name) for name in ("store", "layer", "batch_tokens", "device")}
    base |= {"n_ov_heads": 24, "n_qk_heads": 4, "train_tokens": 4 * STEP, "eval_tokens": 128}
    out = own / "sweep"
    write_sweep(sweep(points(base, grid({"top_k": [2, 4]}), out), out))


def _push(root: Path, own: Path) -> None:
    runs = tuple(root / f"runs/layer-{layer}" for layer in (1, 2))
    push(PushConfig(runs=runs, repo=str(own / "shared"), license="mit"))


def _convert(root: Path, own: Path) -> None:
    try:
        convert(ConvertConfig(source=str(root / "runs/layer-1"), out=own / "ours"))
    except LorsaError as error:
        if "is there already" not in str(error):  # it was done before it was killed
            raise


def _add_sites(root: Path, own: Path) -> None:
    harvest(harvest_config(root, store=own / "acts", sites="attn,mlp,resid"))


def _repair(root: Path, own: Path) -> None:
    verify_store(own / "acts", full=True, repair=True)
    harvest(harvest_config(root, store=own / "acts"))


def _remove(root: Path, own: Path) -> None:
    try:
        remove_sites(str(own / "acts"), "2")
    except LorsaError as error:
        if "layer 2" not in str(error):  # it was gone before it was killed
            raise


def _explain(root: Path, own: Path) -> None:
    explain(explain_config(own / "layer-1", os.environ.get("DRILL_ENDPOINT", ENDPOINT)))


COMMANDS = {
    "harvest": Command((), lambda root, own: harvest(harvest_config(root, store=own / "acts"))),
    "harvest --sites": Command((("acts", "acts"),), _add_sites),
    "train": Command((), _train),
    "sweep": Command((), _sweep),
    "eval": Command(
        (("runs/layer-1", "layer-1"),),
        lambda root, own: evaluate_run(eval_config(root, own / "layer-1")),
    ),
    "analyze": Command(
        (("runs/layer-2", "layer-2"),),
        lambda root, own: analyze_run(analyze_config(root, own / "layer-2")),
    ),
    "view": Command(
        (("runs/layer-1", "layer-1"),), lambda root, own: build_page(own / "layer-1", own / "page")
    ),
    "explain": Command((("runs/layer-1", "layer-1"),), _explain),
    "convert": Command((), _convert),
    "push": Command((("shared", "shared"),), _push),
    "store merge": Command(
        (), lambda root, own: merge_stores([root / "acts", root / "acts-b"], own / "merged")
    ),
    "store verify --repair": Command((("acts-damaged", "acts"),), _repair),
    "store rm": Command((("acts", "acts"),), _remove),
}


class Killed(NamedTuple):
    """What came of a kill."""

    command: str
    moment: str
    problem: str | None
    """What was not as without the kill; None if nothing"""


def drill(root: Path, scratch: Path, name: str, n: int, seed: int) -> list[Killed]:
    """Kill a command so many times, each time anew; return what came of each."""
    command, chance = COMMANDS[name], random.Random(f"{seed} {name}")
    _begin(root, scratch, command)
    started = time.monotonic()
    counted = _run(root, scratch, command, count_into=scratch.with_suffix(".count"))
    took_s = time.monotonic() - started
    assert counted == 0, f"{name} failed without a kill"
    n_events = int(scratch.with_suffix(".count").read_text())
    expected = _state(scratch)
    found = []
    for number in range(n):
        _begin(root, scratch, command)
        at = chance.randrange(1, n_events + 1) if number % 2 == 0 else None
        after_s = None if at is not None else chance.uniform(0, took_s)
        _run(root, scratch, command, at=at, after_s=after_s)
        code = _run(root, scratch, command)
        moment = f"at operation {at} of {n_events}" if at else f"after {after_s:.3f} s"
        problem = f"the same command failed ({code})" if code else None
        found.append(Killed(name, moment, problem or _different(_state(scratch), expected)))
    shutil.rmtree(scratch)
    return found


def _begin(root: Path, own: Path, command: Command) -> None:
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    for what, name in command.before:
        shutil.copytree(root / what, own / name, symlinks=True)


def _run(
    root: Path,
    own: Path,
    command: Command,
    *,
    at: int | None = None,
    after_s: float | None = None,
    count_into: Path | None = None,
) -> int:
    """Run a command in a process, killed at an operation or after a time; return its code."""
    child = os.fork()
    if child == 0:
        _child(root, own, command, at, count_into)
    if after_s is not None:
        time.sleep(after_s)
        if os.waitpid(child, os.WNOHANG)[0]:
            return 0
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _child(
    root: Path, own: Path, command: Command, at: int | None, count_into: Path | None
) -> None:
    count = [0]
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends

    def audit(event: str, args: Any) -> None:
        if event in EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    uuid.uuid4 = lambda: uuid.UUID(int=1)  # type: ignore[assignment] - stores are compared
    code = 1
    try:
        with quick():
            sys.addaudithook(audit)
            command.work(root, own)
        if count_into is not None:
            count_into.write_text(str(count[0]))
        code = 0
    except BaseException as error:
        (own.with_suffix(".error")).write_text(f"{type(error).__name__}: {error}")
    os._exit(code)


def _state(own: Path) -> dict[str, Any]:
    """Return all that a command wrote, and what is wrong with it."""
    files = folder_digest(own)
    kept = {name: value for name, value in files.items() if "/journal/" not in name}
    problems = verify_paths([own], full=True)["problems"]
    return {**kept, "problems": problems}


def _different(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    names = sorted(set(found) | set(expected))
    wrong = [name for name in names if found.get(name) != expected.get(name)]
    if not wrong:
        return None
    one = wrong[0]
    return f"{', '.join(wrong[:4])}: {found.get(one)!r:.120} in place of {expected.get(one)!r:.120}"
