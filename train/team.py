"""The processes that share each step of a run: accelerate's, or this one alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ..kernels import choose_path
from ..model import CheckpointError, choose_device
from ..store import StoreError
from .config import TrainConfig
from .errors import TrainError

Result = TypeVar("Result")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others: of several runs, one may end long before another."""


class Team:
    """The processes that share each step; all do the same things in the same order."""

    def __init__(self, accelerator: Accelerator, *, alone: bool = False) -> None:
        """Make a team of all processes, or of this one alone beside others at other runs."""
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank = 0 if alone else accelerator.process_index
        self.world = 1 if alone else accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for the team."""
        return self.rank == 0

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Wrap a module and its optimizer so that gradients are averaged over the team."""
        if self.world == 1:
            return module, optimizer
        return cast(tuple[Any, Any], self._accelerator.prepare(module, optimizer))

    def unsynced(self, module: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """Leave out the averaging of gradients: more are about to be added."""
        if self.world == 1 or not enabled:
            return nullcontext()
        return cast(AbstractContextManager[Any], self._accelerator.no_sync(module))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the team."""
        return tensor if self.world == 1 else self._reduced(tensor, torch.distributed.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the largest over the team, element by element."""
        return tensor if self.world == 1 else self._reduced(tensor, torch.distributed.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total, op=operation)
        return total

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Do some work on the main process alone; all return its result or raise its error."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (TrainError, CheckpointError, StoreError, OSError) as error:
                outcome[1] = error
        if self.world > 1:
            broadcast_object_list(outcome)
        result, failure = outcome
        if failure is not None:
            raise failure
        return cast(Result, result)

    def wait(self) -> None:
        """Wait for the whole team."""
        if self.world > 1:
            self._accelerator.wait_for_everyone()

    def release(self) -> None:
        """Let go of what was prepared."""
        if self.world > 1:
            self._accelerator.free_memory()


class Launch:
    """The processes of one command, as accelerate launch and torchrun say it."""

    def __init__(self, config: TrainConfig) -> None:
        """Find the processes and this one's device.

        Raises:
            TrainError: the device is not there, or an earlier call here chose another one.
        """
        self._accelerator = make_accelerator(config)
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints."""
        return self.rank == 0

    def team(self, *, alone: bool = False) -> Team:
        """Return all processes as a team, or this one alone."""
        return Team(self._accelerator, alone=alone)

    def gather(self, mine: list[Any]) -> list[Any]:
        """Return what all processes have, in their order."""
        return mine if self.world == 1 else cast(list[Any], gather_object(mine))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return accelerate's view of the processes of this command and their devices.

    Raises:
        TrainError: the device is not there, or an earlier call in this process chose another one.
    """
    try:
        device = choose_device(config.device)
        choose_path(config.backend, device)
    except ValueError as error:
        raise TrainError(str(error)) from None
    try:
        patient = InitProcessGroupKwargs(timeout=PATIENCE)
        accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patient]
        )
    except ValueError as error:  # this process has begun to train on another device
        raise TrainError(f"device {device}: {error}") from None
    if accelerator.device.type != device:
        raise TrainError(
            f"device is {device}, but accelerate is set to {accelerator.device.type} for this "
            "process; give that device, or start another process"
        )
    return accelerator
