"""Which of several processes this is, as accelerate launch and torchrun say it.

They share nothing but the store: each takes the shards that nobody else has. What has to be done
once (reading the text, laying down the store) does the main process; the others wait for it.
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..language.device import choose_device

POLL_S = 0.5
SAY_EVERY_S = 60.0


class Processes(NamedTuple):
    """A process among those of one launch."""

    rank: int
    world: int
    """How many there are"""
    local_rank: int
    """Counted on this machine"""
    local_world: int

    @property
    def is_main(self) -> bool:
        """Whether this one lays down the store."""
        return self.rank == 0


def this_process() -> Processes:
    """Return which process this is; the only one without a launcher."""

    def number(name: str, otherwise: int) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdecimal() else otherwise

    world = number("WORLD_SIZE", 1)
    rank = number("RANK", 0) if world > 1 else 0  # of a script's own, without a launcher
    local_rank = number("LOCAL_RANK", rank)
    return Processes(rank, world, local_rank, number("LOCAL_WORLD_SIZE", world))


def own_devices(name: str, process: Processes) -> list[str]:
    """Return where this process may run a model: "cpu", or its share of this machine's GPUs.

    Args:
        name: one of `DEVICES`.
        process: which of the machine's processes it is.

    Raises:
        ValueError: "cuda" where torch sees no GPU.
    """
    if choose_device(name) == "cpu":
        return ["cpu"]
    n_gpus = torch.cuda.device_count()
    share = max(1, n_gpus // process.local_world)
    first = process.local_rank * share % n_gpus
    return [f"cuda:{gpu}" for gpu in range(first, first + share)]


def wait_for_main(ready: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Wait until the main process has laid down the store; its launcher ends us if it fails."""
    started = said_at = time.monotonic()
    while not ready():
        time.sleep(POLL_S)
        if time.monotonic() - said_at > SAY_EVERY_S:
            said_at = time.monotonic()
            say(f"waiting for the main process, {said_at - started:.0f} s")
