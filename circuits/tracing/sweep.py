"""Contributions of all nodes to some targets, without autograd.

A target reads the residual stream of each token by a vector g[t]. What node s adds to it is
<g[t], v_s>, v_s what s writes at its token t. From the target downwards g is the same until a
module lets something through, and then grows by the adjoint of its path:

    g += reads^T path^T writes^T g        the model's own attention (pattern frozen), or a skip

Where no module below does, g is a vector times how much of each token is read, and all
contributions are one product of matrices, vectors of targets by vectors of nodes, times that.
Otherwise g is held for each token, and swept down through the modules.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .frozen import Frozen, Module
from .sources import Columns, Sources

POSITIONS = 256
"""Tokens whose nodes' vectors are in memory at once."""


class Batch(NamedTuple):
    """Targets that read the residual stream, each with a vector and shares of tokens."""

    vectors: Tensor
    """Distinct vectors, [n_vectors, d_model]"""
    which: Tensor
    """Vector of each target, int64, [n]"""
    shares: Tensor
    """Factor of the vector at positions first, first + 1, ..., [n, n_pos]"""
    first: int
    below: Tensor
    """Depth that bounds the sources of each target, ascending, int64, [n]"""


class Contributions(NamedTuple):
    """Contributions of nodes to the targets of a batch; those of all other nodes are 0."""

    nodes: Tensor
    """Node of each column, int64, [n_columns]"""
    weights: Tensor
    """[n, n_columns]"""


@torch.no_grad()
def contributions(sources: Sources, batch: Batch) -> Contributions:
    """Return what each node adds to each target of a batch."""
    below, stop = int(batch.below[-1]), batch.first + batch.shares.shape[1]
    if sources.frozen.is_thin(below):
        columns = Columns.of(sources, batch.first, stop, below)
        return Contributions(columns.nodes(), _product(sources, batch, columns))
    gradient = (batch.shares[:, :, None] * batch.vectors[batch.which][:, None]).transpose(0, 1)
    return swept(sources, gradient.contiguous(), batch.first, batch.below)


def _product(sources: Sources, batch: Batch, columns: Columns) -> Tensor:
    """Return contributions where nothing but the residual stream joins nodes and targets."""
    first, stop = batch.first, batch.first + batch.shares.shape[1]
    starts = columns.starts()
    weights = batch.vectors.new_zeros(len(batch.which), len(columns))
    for depth, (_these, bias) in columns.pieces.items():
        column = starts[depth]
        rows = slice(int(torch.searchsorted(batch.below, depth, right=True)), None)
        which, shares = batch.which[rows], batch.shares[rows]
        if bias is not None:
            written = _bias(sources.frozen, depth)[first:stop]
            weights[rows, column] = ((batch.vectors @ written.T)[which] * shares).sum(dim=1)
            column += 1
        for some in _parts(sources, depth, first, stop):
            found = (batch.vectors @ sources.vectors(depth, some).T)[which]
            at = sources.nodes.position[some.start : some.stop].long() - first
            factors = shares if stop - first == 1 else shares[:, at.to(shares.device)]
            torch.mul(found, factors, out=weights[rows, column : column + len(some)])
            column += len(some)
    return weights


def _bias(frozen: Frozen, depth: int) -> Tensor:
    """Return what the bias of a depth adds to the residual stream, [T, d_model]."""
    found = frozen.module(depth).bias
    assert found is not None
    return found


def _parts(sources: Sources, depth: int, first: int, stop: int) -> list[range]:
    """Return the nodes of a depth, in runs of so many positions that memory holds."""
    starts = range(first, stop, POSITIONS)
    parts = [sources.between(depth, at, min(at + POSITIONS, stop)) for at in starts]
    return [part for part in parts if len(part)]


@torch.no_grad()
def swept(sources: Sources, gradient: Tensor, first: int, below: Tensor) -> Contributions:
    """Return contributions to targets whose gradient of the residual stream is known.

    Args:
        sources: the nodes.
        gradient: where each target reads, [n_pos, n, d_model].
        first: its first position.
        below: depth that bounds the sources of each target, ascending, int64, [n].
    """
    return _Sweep(sources, gradient, first, below).run()


class _Sweep:
    """Gradients of targets with respect to the residual stream, from the top of a model down."""

    def __init__(self, sources: Sources, gradient: Tensor, first: int, below: Tensor) -> None:
        self._sources, self._below = sources, below
        self._seeds, self._first = gradient, first
        self._stop = first + len(gradient)
        self._top = int(below[-1])
        begin = 0 if sources.frozen.mixes(self._top) else first
        self._columns = Columns.of(sources, begin, self._stop, self._top)
        self._starts = self._columns.starts()
        self._nodes = self._columns.nodes()
        self._weights = gradient.new_zeros(gradient.shape[1], len(self._nodes))
        self._begin = gradient.shape[1]
        """Targets from this one on have been reached"""
        self._gradient = torch.zeros_like(gradient)

    def run(self) -> Contributions:
        """Go down through the modules."""
        frozen, held = self._sources.frozen, []
        for module in reversed(frozen.modules[: self._top - 1]):
            self._reach(module.depth)
            self._read(module.depth)
            if module.passes:
                held.append(self._through(module))
            layer, is_mlp = divmod(module.depth - 1, 2)
            if not (is_mlp and layer in frozen.parallel):  # else both read what the layer reads
                while held:
                    self._add(*held.pop())
        self._reach(0)
        self._read(0)
        return Contributions(self._nodes, self._weights)

    def _reach(self, depth: int) -> None:
        """Begin with the targets whose sources are of this depth at most."""
        begin = int(torch.searchsorted(self._below, depth, right=True))
        if begin < self._begin:
            new, beside = slice(begin, self._begin), len(self._gradient) - len(self._seeds)
            self._gradient[beside:, new] += self._seeds[:, new]
            self._begin = begin

    def _read(self, depth: int) -> None:
        """Take what nodes of a depth contribute."""
        if depth not in self._columns.pieces:
            return
        (these, bias), column = self._columns.pieces[depth], self._starts[depth]
        rows = slice(self._begin, None)
        gradient = self._gradient[:, rows]
        if bias is not None:
            written = _bias(self._sources.frozen, depth)[self._first : self._stop]
            self._weights[rows, column] = torch.einsum("pnd,pd->n", gradient, written)
            column += 1
        for some in _parts(self._sources, depth, self._first, self._stop):
            vectors = self._sources.vectors(depth, some)
            start = column + some.start - these.start
            position = self._sources.nodes.position[some.start : some.stop]
            for at, mine in _runs(position):
                columns = slice(start + mine.start, start + mine.stop)
                self._weights[rows, columns] = gradient[at - self._first] @ vectors[mine].T

    def _through(self, module: Module) -> tuple[Tensor, int]:
        """Return what a module's path makes of the gradient, and its first position."""
        assert module.path is not None
        scale = module.writes.scale[self._first : self._stop, None, None]
        of_output = module.writes.back(self._gradient[:, self._begin :]) * scale
        of_input, first = module.path.back(of_output, self._first)
        return module.reads.back(of_input) * module.reads.scale[
            first : self._stop, None, None
        ], first

    def _add(self, gradient: Tensor, first: int) -> None:
        """Add to the gradient, which may come to have positions before its first."""
        if first < self._first:
            wider = self._gradient.new_zeros(self._stop - first, *self._gradient.shape[1:])
            wider[self._first - first :] = self._gradient
            self._gradient, self._first = wider, first
        self._gradient[first - self._first :, self._begin :] += gradient


def _runs(position: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each of some ascending positions, and where it stands."""
    values, counts = position.unique_consecutive(return_counts=True)
    begin = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        yield value, slice(begin, begin + count)
        begin += count
