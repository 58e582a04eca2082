"""Sources of a trace: the nodes of a frozen run, where they lie, and what each writes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

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


class Piece(NamedTuple):
    """Nodes of one depth, at a run of tokens."""

    depth: int
    these: range
    """Nodes, biases aside"""
    bias: int | None
    """The depth's bias, whose column comes before theirs; None where it has none"""

    @property
    def width(self) -> int:
        """Number of nodes."""
        return len(self.these) + (self.bias is not None)

    def nodes(self) -> Tensor:
        """Return the nodes, int32, [n]."""
        these = torch.arange(self.these.start, self.these.stop, dtype=torch.int32)
        return these if self.bias is None else torch.cat([torch.tensor([self.bias]).int(), these])


def pieces_of(
    sources: Sources, first: int, stop: int, below: int, *, most: int | None = None
) -> list[Piece]:
    """Return the nodes at positions first to stop - 1 of depths below one, by depth.

    Args:
        sources: the nodes.
        first, stop: positions.
        below: depth that bounds theirs.
        most: nodes of a piece, where one token has not more; None leaves each depth whole.
    """
    found = []
    for depth in range(below):
        these, bias = sources.between(depth, first, stop), sources.bias(depth)
        n_pos = stop - first if most is None else max(1, most * (stop - first) // (len(these) + 1))
        for at in range(first, stop, n_pos):
            some = sources.between(depth, at, min(at + n_pos, stop))
            if len(some) or bias is not None:
                found.append(Piece(depth, some, bias))
            bias = None
    return found


def together(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Yield pieces in runs of so many nodes at most, where one piece has not more."""
    run: list[Piece] = []
    for piece in pieces:
        if run and sum(each.width for each in run) + piece.width > most:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run
