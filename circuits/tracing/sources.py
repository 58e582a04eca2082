"""Sources of a trace: the nodes of a frozen run, where they lie, and what each writes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .frozen import Frozen, Module
from .nodes import BIAS, EMBED, ERROR, EVERYWHERE, FEATURE, LOGIT, NOBODY, Nodes


@torch.no_grad()
def find_nodes(frozen: Frozen) -> Nodes:
    """Return the nodes of a frozen run.

    They are the embedding of each token, every feature that fires, the error at each token of what
    a dictionary or an MLP that nothing replaces writes, the bias of each module that has one, and
    the goals.
    """
    n_tokens = len(frozen.tokens)
    every = torch.arange(n_tokens)
    parts = [_some(EMBED, 0, every, frozen.tokens.cpu())]
    for module in frozen.modules:
        if module.bias is not None:
            parts.append(_some(BIAS, module.depth, torch.tensor([EVERYWHERE]), run=module.run))
        if module.code is not None:
            acts, ids = (part.cpu() for part in module.code)
            position, slot = acts.nonzero(as_tuple=True)  # by position, then by id
            fired = ids[position, slot], acts[position, slot]
            parts.append(_some(FEATURE, module.depth, position, *fired, run=module.run))
        if module.error is not None:
            parts.append(_some(ERROR, module.depth, every, run=module.run))
    goals = torch.tensor([(goal.position, goal.token) for goal in frozen.goals], dtype=torch.long)
    at, token = goals.view(-1, 2).T
    values = torch.tensor([goal.value for goal in frozen.goals])
    parts.append(_some(LOGIT, frozen.end, at, token, values))
    nodes = Nodes(*(torch.cat(part) for part in zip(*parts, strict=True)))
    key = (nodes.depth.long() * (n_tokens + 1) + nodes.position + 1) * (LOGIT + 1) + nodes.kind
    return nodes.of(key.argsort(stable=True))


def _some(
    kind: int,
    depth: int,
    position: Tensor,
    feature: Tensor | None = None,
    value: Tensor | None = None,
    *,
    run: int = NOBODY,
) -> tuple[Tensor, ...]:
    """Return nodes of one kind and depth as the fields of `Nodes`."""
    n = len(position)
    return (
        torch.full((n,), kind, dtype=torch.int8),
        torch.full((n,), depth, dtype=torch.int16),
        position.int(),
        torch.full((n,), run, dtype=torch.int16),
        torch.full((n,), NOBODY) if feature is None else feature.long(),
        torch.ones(n) if value is None else value.float(),
    )


class Sources:
    """The nodes of a frozen run by depth and position, and the vectors that they write."""

    def __init__(self, frozen: Frozen, nodes: Nodes) -> None:
        """Look up where the nodes of each depth and position lie.

        Args:
            frozen: the run.
            nodes: all of its nodes, from `find_nodes`.
        """
        self.frozen, self.nodes = frozen, nodes
        self._width = len(frozen.tokens) + 1
        key = nodes.depth.long() * self._width + nodes.position + 1
        self._first = torch.searchsorted(key, torch.arange(self._width * (frozen.end + 1) + 1))

    def between(self, depth: int, first: int, stop: int) -> range:
        """Return the nodes of a depth at positions first to stop - 1, without its bias."""
        at = depth * self._width + 1
        return range(int(self._first[at + first]), int(self._first[at + stop]))

    def bias(self, depth: int) -> int | None:
        """Return the bias of a depth; None if it has none."""
        at = depth * self._width
        return int(self._first[at]) if self._first[at] < self._first[at + 1] else None

    def vectors(self, depth: int, these: range) -> Tensor:
        """Return what nodes of one depth, biases aside, add to the residual stream.

        Returns:
            [n, d_model], in the run's precision.
        """
        chosen = self.nodes.of(slice(these.start, these.stop))
        device = self.frozen.embedded.device
        at = chosen.position.long().to(device)
        if depth == 0:
            return self.frozen.embedded[at]
        module = self.frozen.module(depth)
        if module.dictionary is None:
            assert module.error is not None
            return module.error[at]
        fires = (chosen.kind == FEATURE).to(device)
        found = self.frozen.embedded.new_empty(len(at), self.frozen.embedded.shape[1])
        found[fires] = _written(
            module, chosen.feature.to(device)[fires], chosen.value.to(device)[fires], at[fires]
        )
        if module.error is not None:
            found[~fires] = module.error[at[~fires]]
        return found


def _written(module: Module, ids: Tensor, acts: Tensor, at: Tensor) -> Tensor:
    """Return what features with some activations at positions add to the residual stream."""
    assert module.dictionary is not None
    rows = module.writes.direction(module.dictionary.directions(ids).written)
    return rows * (acts * module.writes.scale[at])[:, None]


@dataclass(frozen=True, slots=True)
class Columns:
    """Nodes that are sources of some targets, in the order of the columns of their weights."""

    pieces: dict[int, tuple[range, int | None]]
    """Nodes of each depth that has any, and its bias, whose column comes before theirs"""

    @classmethod
    def of(cls, sources: Sources, first: int, stop: int, below: int) -> "Columns":
        """Return the sources at positions first to stop - 1 of depths below one."""
        every = {d: (sources.between(d, first, stop), sources.bias(d)) for d in range(below)}
        return cls({d: each for d, each in every.items() if len(each[0]) or each[1] is not None})

    def nodes(self) -> Tensor:
        """Return the node of each column, int64, [n]."""
        parts = []
        for these, bias in self.pieces.values():
            parts.append(torch.tensor([] if bias is None else [bias], dtype=torch.long))
            parts.append(torch.arange(these.start, these.stop))
        return torch.cat(parts)

    def __len__(self) -> int:
        return sum(len(these) + (bias is not None) for these, bias in self.pieces.values())

    def starts(self) -> dict[int, int]:
        """Return the first column of each depth, that of its bias if it has one."""
        found, n = {}, 0
        for depth, (these, bias) in self.pieces.items():
            found[depth] = n
            n += len(these) + (bias is not None)
        return found
