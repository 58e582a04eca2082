"""A dictionary and its Adam, on as many processes as there are.

    copies    every process has all of both; gradients are averaged (torch's DDP)
    shard     every process keeps its rows of weights, gradients and moments (torch's FSDP2); the
              whole weights are there during a step, an eval and a checkpoint only
    exact     as copies, but the gradients of single sequences are added up in float64, so that any
              number of processes makes the same run

Whatever the way, what is saved is a whole dictionary and whole moments.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dictionaries.dictionary import Dictionary
from .config import TrainConfig
from .objective import Objective
from .team import Team

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
THRESHOLD_LR_FACTOR = 10.0
"""Learning rate of log_threshold over that of the weights: it is the share of a threshold by which
Adam moves it in a step, and thresholds have to keep up with the scores; docs/recipe.md."""


class Whole(NamedTuple):
    """A dictionary in training and its moments, whole and on the CPU."""

    weights: dict[str, Tensor]
    """Parameters and buffers by their names"""
    moments: dict[str, Tensor]
    """Moments of Adam, by the parameter's name and their own, as W_Q.exp_avg"""


class Learner:
    """Dictionary in training: takes its optimizer steps."""

    def __init__(
        self,
        dictionary: Dictionary,
        config: TrainConfig,
        team: Team,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Share the main process's dictionary; Adam resumes with `moments`."""
        self.dictionary, self.team, self.config = dictionary, team, config
        self.sharded = config.shard and team.world > 1
        objective = Objective(
            dictionary, jump_bandwidth=config.jump_bandwidth, l0_coefficient=config.l0_coefficient
        )
        self.module: nn.Module = self._shared(objective)
        self.adam = torch.optim.Adam(
            _groups(dictionary), lr=config.lr, betas=config.betas, fused=True
        )
        self._sums: list[Tensor] = []
        if config.exact:
            self._sums = [torch.zeros_like(p, dtype=torch.float64) for p in dictionary.parameters()]
        if moments is not None:
            self._resume(moments)

    def _shared(self, module: nn.Module) -> nn.Module:
        if self.sharded:
            return self.team.shard(module)
        return self.team.spread(module) if self.config.exact else self.team.copies(module)

    def begin(self, lr: float) -> None:
        """Begin a step."""
        self.clear()
        for total in self._sums:
            total.zero_()
        for group in self.adam.param_groups:
            group["lr"] = lr * group["lr_factor"]

    def unsynced(self, *, enabled: bool) -> AbstractContextManager[Any]:
        """Leave out the averaging of a part's gradients: other parts of the step follow."""
        alone = self.sharded or self.config.exact  # shards are added up part by part
        return self.team.unsynced(self.module, enabled=enabled and not alone)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step.

        Args:
            loss: the part's share of the loss of the whole step, over all processes.
        """
        if not self.config.exact:
            (loss * self.team.world).backward()  # averaged over processes
            return
        loss.backward()
        pairs = zip(self._sums, self.dictionary.parameters(), strict=True)
        sums, grads = zip(*((s, p.grad) for s, p in pairs if p.grad is not None), strict=True)
        torch._foreach_add_(sums, grads)
        self.clear()

    def clip(self, largest: float) -> float:
        """Bring the step's gradients together and scale them to a norm of at most `largest`.

        Returns:
            Norm of the gradients before, over all processes.
        """
        for parameter, total in zip(self.dictionary.parameters(), self._sums, strict=False):
            parameter.grad = self.team.sum(total).to(parameter.dtype)
        grads = [self.team.part(p.grad) for p in self.dictionary.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]
        square = torch.stack(norms).square().sum()
        norm = float((self.team.sum(square) if self.sharded else square).sqrt())
        if norm > largest:
            torch._foreach_mul_(grads, largest / norm)
        return norm

    def step(self) -> None:
        """Take a step of Adam."""
        self.adam.step()

    def clear(self) -> None:
        """Drop the gradients."""
        self.adam.zero_grad()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Have the whole dictionary on this process, to be measured."""
        if not self.sharded:
            yield
            return
        self.module.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            self.module.reshard()  # type: ignore[operator]

    def whole(self) -> Whole:
        """Return the whole dictionary and moments, on the main process; all processes take part."""
        weights, moments = {}, {}
        for name, parameter in self.dictionary.named_parameters():
            weights[name] = self.team.whole(parameter.detach())
            for key in ADAM_STATE if parameter in self.adam.state else ():
                moments[f"{name}.{key}"] = self.team.whole(self.adam.state[parameter][key])
        weights |= {name: buffer.detach().cpu() for name, buffer in self.dictionary.named_buffers()}
        return Whole(weights, moments)

    def _resume(self, moments: Mapping[str, Tensor]) -> None:
        """Set the moments of Adam, given whole; a sharded parameter keeps its part."""
        state = {}
        for number, (name, parameter) in enumerate(self.dictionary.named_parameters()):
            state[number] = {
                key: self.team.part_of(moments[f"{name}.{key}"], like=parameter)
                for key in ADAM_STATE
            }
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": state, "param_groups": groups})


def _groups(dictionary: Dictionary) -> list[dict[str, Any]]:
    """Return Adam's groups of parameters, in the order in which the dictionary has them."""
    weights = [p for name, p in dictionary.named_parameters() if name != "log_threshold"]
    groups: list[dict[str, Any]] = [{"params": weights, "lr_factor": 1.0}]
    if dictionary.log_threshold is not None:  # the last of all
        groups.append({"params": [dictionary.log_threshold], "lr_factor": THRESHOLD_LR_FACTOR})
    return groups
