"""Rank of this process among several, as accelerate launch and torchrun give it.

The processes share nothing but the store: each takes the shards that no other has taken. The main
process does what has to be done once (reading the text, creating the store); the others wait.
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..language.device import choose_device

POLL_S = 0.5
REPORT_AFTER_S = 4.0
REPORT_EVERY_S = 60.0


class Processes(NamedTuple):
    """Rank of a process among those of one launch."""

    rank: int
    world: int
    """Number of processes"""
    local_rank: int
    """Rank among the processes of this machine"""
    local_world: int
    """Number of processes on this machine"""

    @property
    def is_main(self) -> bool:
        """Whether this process creates the store."""
        return self.rank == 0


def this_process() -> Processes:
    """Return the ranks of this process; without a launcher it is the only one."""

    def number(name: str, otherwise: int) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdecimal() else otherwise

    world = number("WORLD_SIZE", 1)
    rank = number("RANK", 0) if world > 1 else 0  # of a script's own, without a launcher
    local_rank = number("LOCAL_RANK", rank)
    return Processes(rank, world, local_rank, number("LOCAL_WORLD_SIZE", world))


def own_devices(name: str, process: Processes) -> list[str]:
    """Return the devices of this process: "cpu", or its share of this machine's GPUs.

    Args:
        name: one of `DEVICES`.
        process: its ranks.

    Raises:
        ValueError: "cuda" where torch sees no GPU.
    """
    if choose_device(name) == "cpu":
        return ["cpu"]
    n_gpus = torch.cuda.device_count()
    share = max(1, n_gpus // process.local_world)
    first = process.local_rank * share % n_gpus
    return [f"cuda:{gpu}" for gpu in range(first, first + share)]


def wait_for_main(ready: Callable[[], bool], report: Callable[[str], None]) -> None:
    """Wait until the main process has created the store; the launcher ends this one if it fails."""
    started = time.monotonic()
    report_at = started + min(REPORT_AFTER_S, REPORT_EVERY_S)
    while not ready():
        time.sleep(POLL_S)
        if (now := time.monotonic()) > report_at:
            report_at = now + REPORT_EVERY_S
            report(f"waiting for the main process to create the store, {now - started:.0f} s")
