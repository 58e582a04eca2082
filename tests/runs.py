"""Many runs in one launch of several processes: they take long to start.

    python runs.py 2 STORE OUT '{"name": {"field": value}}'
    torchrun --nproc-per-node 2 runs.py 2 STORE OUT '{"name": {"field": value}}'

Without a launcher the processes are forked from one that has loaded torch but computed nothing,
which costs milliseconds; when one fails, the others are ended, as a launcher does.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from lorsa.train import group
from lorsa.train.config import TrainConfig
from lorsa.train.report import reporting
from lorsa.train.train import train
from tiny import N_CTX

STEP = 4 * N_CTX


def settings(store: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a small run, but for its folder."""
    return {
        "store": store,
        "layer": 1,
        "top_k": 8,
        "batch_tokens": STEP,
        "train_tokens": 20 * STEP,
        "eval_tokens": 6 * N_CTX,
        "init_tokens": 16 * N_CTX,
        "device": "cpu",
    } | changes


def config(store: Path, out: Path, changes: dict[str, Any]) -> TrainConfig:
    """Return a small run."""
    return TrainConfig(**settings(store, **changes), out=out)


def no_picture(run: Path, result: object = None) -> Path:
    """Be quick where a run draws its curves, which takes longer than all of its steps."""
    path = run / "curves.png"
    path.touch()
    return path


def main() -> None:
    if "RANK" in os.environ:
        run()
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = {start(rank, port) for rank in range(int(sys.argv[1]))}
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def start(rank: int, port: int) -> int:
    """Run in a process of its own and return its id."""
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": sys.argv[1]}
        os.environ |= {"LOCAL_WORLD_SIZE": sys.argv[1]}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def run() -> None:
    store, out, variants = Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    group.LOG_EVERY_STEPS = 1  # every loss is compared; of this process alone
    reporting.draw_curves = no_picture
    for name, changes in variants.items():
        train(config(store, out / name, changes))


if __name__ == "__main__":
    main()
