"""Runs of several processes of which one fails, without a launcher that would end the others.

    python failing.py STORE OUT '[{"name": "memory", "rank": 1, "fault": "memory", ...}]'

Each drill forks its processes, lets one fail and waits for all. What a process says lies in
OUT/NAME/RANK.txt; exit codes, by drill and process, are printed as JSON.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import typer
from lorsa.commands.common import perform
from lorsa.errors import StoreError
from lorsa.store.read.reader import ActivationStore
from lorsa.train import alarm, group
from lorsa.train import train as many
from lorsa.train.learner import Learner
from lorsa.train.mask import TokenMask
from lorsa.train.report import reporting
from lorsa.train.run_folder import RunFolder
from lorsa.train.train import train_many
from runs import config, no_picture

PATIENCE_S = 60.0
"""A process that has not ended after so long waits for ever."""
AT = 6
"""Which call of something fails."""


def fail_at(owner: Any, name: str, error: BaseException | None, at: int = AT) -> None:
    """Let a function fail at one of its calls: None kills the process."""
    whole, calls = getattr(owner, name), []

    def instead(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == at and error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(calls) == at and error is not None:
            raise error
        return whole(*args, **kwargs)

    setattr(owner, name, instead)


def fail_to_read(at: int = AT) -> None:
    """Let the first group's reader fail, as at a damaged shard."""
    whole, calls = group.batches, []

    def batches(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        for number, batch in enumerate(whole(*args, **kwargs)):
            if len(calls) == 1 and number == at:
                raise StoreError("acts is damaged")
            yield batch

    group.batches = batches


def spoil_metrics() -> None:
    """Put a folder in the place of one run's metrics.jsonl, once the run has begun."""
    whole = RunFolder.drop_after

    def drop_after(folder: RunFolder, step: int) -> None:
        whole(folder, step)
        if folder.root.name == "spoilt":
            (folder.root / "metrics.jsonl").unlink(missing_ok=True)
            (folder.root / "metrics.jsonl").mkdir()

    RunFolder.drop_after = drop_after  # type: ignore[method-assign]


def spoil_construction() -> None:
    """Let one run find no room for its Lorsa."""
    whole = many.Run

    def build(asked: Any, *args: Any) -> Any:
        if asked.config.out.name == "spoilt":
            raise torch.OutOfMemoryError("none left")
        return whole(asked, *args)

    many.Run = build  # type: ignore[assignment,misc]


def stay_after_failing() -> None:
    """Fail, and keep the connections open: NCCL's do not tell either that a process is gone."""
    fail_at(Learner, "clip", torch.OutOfMemoryError("none left"))
    whole = alarm.Alarm._report

    def tell(*args: Any) -> None:
        whole(*args)
        time.sleep(PATIENCE_S / 4)

    alarm.Alarm._report = tell  # type: ignore[method-assign]


FAULTS = {
    "memory": lambda: fail_at(Learner, "clip", torch.OutOfMemoryError("none left")),
    "bug": lambda: fail_at(Learner, "clip", ZeroDivisionError("a bug")),
    "disk": lambda: fail_at(Learner, "clip", OSError(5, "Input/output error", "/disk")),
    "killed": lambda: fail_at(Learner, "clip", None),
    "stopped": lambda: fail_at(Learner, "clip", KeyboardInterrupt()),
    "stays": stay_after_failing,
    "read": fail_to_read,
    "first-read": lambda: fail_to_read(0),
    "eval": lambda: fail_at(ActivationStore, "stored", StoreError("acts is damaged"), 2),
    "mask": lambda: fail_at(TokenMask, "_bits", StoreError("norms are damaged"), 4),
    "plan": lambda: fail_at(many, "make_request", ZeroDivisionError("a bug"), 1),
    "metrics": spoil_metrics,
    "construction": spoil_construction,
    "none": lambda: None,
}


def work(rank: int, store: Path, out: Path, drill: dict[str, Any]) -> int:
    """Do what one process does, and return its exit code."""
    group.LOG_EVERY_STEPS, alarm.GRACE_S = 1, drill.get("grace_s", 30.0)
    reporting.draw_curves = no_picture
    if rank in (drill["rank"], drill.get("too")):
        FAULTS[drill["fault"]]()
    asked = [config(store, out / name, changes) for name, changes in drill["runs"].items()]

    def train_all() -> dict[str, Any]:
        outcomes = train_many(asked, apart=drill.get("apart", False))
        errors = {o.config.out.name: str(o.failure) for o in outcomes if o.failure is not None}
        return {"errors": errors, "ok": not errors}

    try:
        perform("train", train_all, as_json=True)
    except typer.Exit as ended:
        return ended.exit_code
    return 0


def start(rank: int, port: int, store: Path, out: Path, drill: dict[str, Any]) -> int:
    """Begin a process and return its id."""
    child = os.fork()
    if child:
        return child
    world = str(drill.get("world", 2))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
    os.environ |= {"LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (out / f"{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        code = work(rank, store, out, drill)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def carry_out(store: Path, out: Path, drill: dict[str, Any]) -> list[int | None]:
    """Begin the processes of a drill and return their exit codes, None of one that hangs."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = range(drill.get("world", 2))
    children = {start(rank, port, store, out, drill): rank for rank in ranks}
    codes: list[int | None] = [None for _ in ranks]
    limit = time.monotonic() + PATIENCE_S
    while children and time.monotonic() < limit:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.05)
        else:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return codes


def main() -> None:
    store, out = Path(sys.argv[1]), Path(sys.argv[2])
    for drill in json.loads(sys.argv[3]):
        codes = carry_out(store, out / drill["name"], drill)
        print(json.dumps({"name": drill["name"], "codes": codes}), flush=True)


if __name__ == "__main__":
    main()
