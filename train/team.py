"""Team of the processes that share each step of a run: accelerate's, or this one alone."""

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ..errors import RUN_ERRORS, LorsaError, TrainError
from ..kernels.dispatch import choose_path
from ..language.device import choose_device
from .alarm import Alarm, is_broken_collective, one_line
from .config import TrainConfig

_Result = TypeVar("_Result")
_Error = TypeVar("_Error", bound=BaseException)
FAILURES = (*RUN_ERRORS, torch.OutOfMemoryError)
"""Errors of one process that are reported to the others."""
JOINING = timedelta(minutes=30)
"""Time that a process waits for all others to begin."""
PATIENCE = timedelta(days=7)
"""Time that a process waits for the others: of several runs, one may end long before another."""


class Team:
    """Processes that share each step; all do the same things in the same order."""

    def __init__(self, accelerator: Accelerator, alarm: Alarm, *, alone: bool = False) -> None:
        """Make a team of all processes, or of this one alone; `all_processes` makes the first."""
        self._accelerator = accelerator
        self.alarm = alarm
        self.device: torch.device = accelerator.device
        self.rank = 0 if alone else accelerator.process_index
        self.world = 1 if alone else accelerator.num_processes

    def alone(self) -> "Team":
        """Return this process as a team, beside others at other runs."""
        return Team(self._accelerator, self.alarm, alone=True)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports for the team."""
        return self.rank == 0

    def agreed(self, error: _Error) -> _Error:
        """Note that the whole team raises an error at the same place, and return it."""
        return error if self.world == 1 else self.alarm.agreed(error)

    def is_agreed(self, error: BaseException) -> bool:
        """Return whether the whole team raises an error at the same place."""
        return self.world == 1 or self.alarm.is_agreed(error)

    def copies(self, module: nn.Module) -> nn.Module:
        """Give every process the main one's module; backward averages gradients over the team."""
        return module if self.world == 1 else cast(nn.Module, self._accelerator.prepare(module))

    def spread(self, module: nn.Module) -> nn.Module:
        """Give every process the main one's tensors, and leave gradients to each."""
        if self.world > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)
        return module

    def shard(self, module: nn.Module) -> nn.Module:
        """Leave every process its rows of the main one's parameters and of averaged gradients."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        return cast(nn.Module, fully_shard(self.spread(module), mesh=mesh))

    def part(self, tensor: Tensor) -> Tensor:
        """Return this process's part of a sharded tensor; any other tensor as it is."""
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    def part_of(self, whole: Tensor, *, like: Tensor) -> Tensor:
        """Return a whole tensor sharded like another, if that is sharded and has its shape."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor) or whole.shape != like.shape:
            return whole
        return distribute_tensor(whole.to(self.device), like.device_mesh, like.placements)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a tensor whole, on the CPU; all processes take part, the main one has it."""
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        return tensor.detach().cpu().contiguous() if self.is_main else tensor

    def unsynced(self, module: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """Leave out the averaging of gradients: more are added before the step."""
        if self.world == 1 or not enabled:
            return nullcontext()
        return cast(AbstractContextManager[Any], self._accelerator.no_sync(module))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the team."""
        return tensor if self.world == 1 else self._reduced(tensor, torch.distributed.ReduceOp.SUM)

    def sums(
        self, numbers: Mapping[str, Sequence[float]], tensors: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, list[float]]:
        """Return the sums over the team of numbers and of scalar tensors, by name.

        All travel in one tensor: one reduction, and one wait for the device.

        Args:
            numbers: numbers on the host; under each name as many as on the other processes.
            tensors: float64 scalars on the device; under each name as many, too.
        """
        host = [number for some in numbers.values() for number in some]
        packed = torch.tensor(host, dtype=torch.float64, device=self.device)
        scalars = [tensor for some in tensors.values() for tensor in some]
        total = iter(self.sum(torch.stack([*packed, *scalars])).tolist())
        named = {**numbers, **tensors}
        return {name: list(islice(total, len(some))) for name, some in named.items()}

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the largest over the team, element by element."""
        return tensor if self.world == 1 else self._reduced(tensor, torch.distributed.ReduceOp.MAX)

    def least(self, number: int) -> int:
        """Return the smallest of the team's numbers."""
        numbers: list[int] = self.gather([number])
        return min(numbers)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total, op=operation)
        return total

    def on_main(self, work: Callable[[], _Result]) -> _Result:
        """Do some work on the main process alone; all return its result or raise its error."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                with self.alarm.writing:
                    outcome[0] = work()
            except FAILURES as error:
                outcome[1] = portable(error)
        broadcast_object_list(outcome)
        result, failure = outcome
        if failure is not None:
            raise self.agreed(failure)
        return cast(_Result, result)

    def together(self, work: Callable[[], _Result]) -> _Result:
        """Do some work on every process; what goes wrong on one is raised on all."""
        mine: list[_Result] = []
        self.each(lambda: mine.append(work()))
        return mine[0]

    def each(self, work: Callable[[], _Result]) -> list[_Result]:
        """Do some work on every process and return all results, in the processes' order.

        What goes wrong on one is raised on all.
        """
        if self.world == 1:
            return [work()]
        result: _Result | None = None
        failure: Exception | None = None
        try:
            result = work()
        except FAILURES as error:
            failure = portable(error)
        everywhere: list[tuple[_Result, Exception | None]] = gather_object([(result, failure)])
        failures = [
            (rank, error) for rank, (_, error) in enumerate(everywhere) if error is not None
        ]
        if not failures:
            return [each for each, _ in everywhere]
        rank, first = failures[0]
        if len(failures) < self.world:  # it is not the same everywhere
            first = type(first)(f"process {rank} of {self.world}: {first}")
        raise self.agreed(first)

    def gather(self, mine: list[Any]) -> list[Any]:
        """Return what all processes have, in their order."""
        return mine if self.world == 1 else cast(list[Any], gather_object(mine))

    def wait(self) -> None:
        """Wait for the whole team."""
        if self.world > 1:
            self._accelerator.wait_for_everyone()

    def release(self) -> None:
        """Free the modules that were prepared."""
        if self.world > 1:
            self._accelerator.free_memory()


def all_processes(config: TrainConfig) -> Team:
    """Return the processes of this command, as accelerate launch or torchrun began them.

    Raises:
        TrainError: the device is not there, or an earlier call here chose another one.
    """
    accelerator = make_accelerator(config)
    start = [uuid.uuid4().hex]
    if accelerator.num_processes > 1:
        broadcast_object_list(start)
    alarm = Alarm(accelerator.process_index, accelerator.num_processes, start[0])
    return Team(accelerator, alarm)


def portable(error: Exception) -> Exception:
    """Return an error as another process can read it: those of other packages may not travel."""
    return error if isinstance(error, LorsaError) else TrainError(one_line(error))


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
    _require_launch(device)
    try:
        joining = InitProcessGroupKwargs(timeout=JOINING)
        accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[joining]
        )
    except ValueError as error:  # this process has begun to train on another device
        raise TrainError(f"device {device}: {error}") from None
    except RuntimeError as error:
        if not is_broken_collective(error):
            raise
        raise TrainError(
            f"the processes did not come together ({one_line(error)}); see what the others said, "
            "and start all of them again"
        ) from None
    if accelerator.num_processes > 1:
        torch.distributed.distributed_c10d._set_pg_timeout(PATIENCE)
    if accelerator.device.type != device:
        raise TrainError(
            f"device is {device}, but accelerate is set to {accelerator.device.type} for this "
            "process; give that device, or start another process"
        )
    return accelerator


def _require_launch(device: str) -> None:
    """Raise TrainError if the launcher was asked for what is done otherwise here."""
    for name, option in (("FSDP", "--use_fsdp"), ("DEEPSPEED", "--use_deepspeed")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise TrainError(
                f"accelerate is set to {option}; leave it out and give lorsa train --shard, which "
                "shares weights, gradients and moments among the processes"
            )
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and n_here > torch.cuda.device_count():
        raise TrainError(
            f"{n_here} processes were started on a machine with {torch.cuda.device_count()} GPUs; "
            f"start {torch.cuda.device_count()}, or give --device cpu"
        )
