"""Contributions of all nodes to some targets, without autograd.

A target reads the residual stream of each token by a vector g[t]. What node s adds to it is
<g[t], v_s>, v_s what s writes at its token t. From the target downwards g is the same until a
module lets something through, and then grows by the adjoint of its path:

    g += reads^T path^T writes^T g        the model's own attention (pattern frozen), or a skip

Where no module below does, g is a vector times how much of each token is read, and all
contributions are one product of matrices, vectors of targets by vectors of nodes, times that.
Otherwise g is held for each token, and swept down through the modules.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .frozen import Frozen, Module
from .sources import Piece, Sources, pieces_of, together

BLOCK = 1 << 22
"""Contributions that are made at once, 16 MiB in float32: about what a processor caches."""
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
    reach: Tensor | None = None
    """Last position that each target reads, ascending, int64, [n]; None if that is of no use"""


class Contributions(NamedTuple):
    """Contributions of some nodes to the targets of a batch."""

    nodes: Tensor
    """Node of each column, int32, [n_columns]"""
    weights: Tensor
    """[n, n_columns]"""


def contributions(sources: Sources, batch: Batch) -> Contributions:
    """Return what nodes add to each target of a batch; those that are not there add nothing."""
    nodes, weights = zip(*contributed(sources, batch), strict=True)
    return Contributions(torch.cat(nodes), torch.cat(weights, dim=1))


@torch.no_grad()
def contributed(sources: Sources, batch: Batch) -> Iterator[Contributions]:
    """Yield what nodes add to each target of a batch, some of the nodes at a time."""
    if sources.frozen.is_thin(int(batch.below[-1])):
        yield from _products(sources, batch)
        return
    gradient = (batch.shares[:, :, None] * batch.vectors[batch.which][:, None]).transpose(0, 1)
    yield from swept(sources, gradient.contiguous(), batch.first, batch.below)


def _products(sources: Sources, batch: Batch) -> Iterator[Contributions]:
    """Yield contributions where nothing but the residual stream joins nodes and targets."""
    first, stop = batch.first, batch.first + batch.shares.shape[1]
    batch, needed = _by_need(batch)
    most = _width(len(batch.which))
    for run in together(pieces_of(sources, first, stop, int(batch.below[-1]), most=most), most):
        made = _empty(batch.vectors, len(batch.which), run)
        column = 0
        for piece in run:
            some = made.weights[:, column : column + piece.width]
            _product(sources, batch, needed, piece, some)
            column += piece.width
        yield made


def _width(n: int) -> int:
    """Return the nodes whose contributions to n targets fill a block."""
    return max(1, BLOCK // max(n, 1))


def _by_need(batch: Batch) -> tuple[Batch, Tensor | None]:
    """Return a batch whose vectors are sorted by the last position that any target reads by them.

    Returns:
        The batch, and these positions, int64, [n_vectors]; None where the batch has no reach.
    """
    if batch.reach is None:
        return batch, None
    needed = batch.reach.new_zeros(len(batch.vectors))
    needed.scatter_reduce_(0, batch.which.cpu(), batch.reach, "amax")
    needed, order = needed.sort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    order, rank = order.to(batch.which.device), rank.to(batch.which.device)
    return batch._replace(vectors=batch.vectors[order], which=rank[batch.which]), needed


def _empty(like: Tensor, n: int, run: Sequence[Piece]) -> Contributions:
    """Return zeros for the contributions of a run of pieces to n targets."""
    nodes = torch.cat([piece.nodes() for piece in run])
    return Contributions(nodes, like.new_zeros(n, len(nodes)))


def _product(
    sources: Sources, batch: Batch, needed: Tensor | None, piece: Piece, weights: Tensor
) -> None:
    """Fill in the contributions of a piece, [n, width].

    Args:
        sources: the nodes.
        batch, needed: see `_by_need`.
        piece: some of the nodes.
        weights: zeros.
    """
    first, n_pos = batch.first, batch.shares.shape[1]
    rows = slice(int(torch.searchsorted(batch.below, piece.depth, right=True)), None)
    which, shares = batch.which[rows], batch.shares[rows]
    if piece.bias is not None:
        written = _bias(sources.frozen, piece.depth)[first : first + n_pos]
        weights[rows, 0] = ((batch.vectors @ written.T)[which] * shares).sum(dim=1)
        weights = weights[:, 1:]
    if not len(piece.these):
        return
    at, begin = sources.nodes.position[piece.these.start : piece.these.stop].long(), 0
    if batch.reach is not None and needed is not None:  # nothing is read before the first of these
        rows = slice(max(rows.start, int(torch.searchsorted(batch.reach, at[0]))), None)
        which, shares = batch.which[rows], batch.shares[rows]
        begin = int(torch.searchsorted(needed, at[0]))
    found = batch.vectors[begin:] @ sources.vectors(piece.depth, piece.these).T
    if n_pos > 1:
        shares = shares[:, (at - first).to(shares.device)]
    torch.mul(found[which - begin], shares, out=weights[rows])


def _bias(frozen: Frozen, depth: int) -> Tensor:
    """Return what the bias of a depth adds to the residual stream, [T, d_model]."""
    found = frozen.module(depth).bias
    assert found is not None
    return found


@torch.no_grad()
def swept(sources: Sources, gradient: Tensor, first: int, below: Tensor) -> Iterator[Contributions]:
    """Yield contributions to targets whose gradient of the residual stream is known.

    Args:
        sources: the nodes.
        gradient: where each target reads, [n_pos, n, d_model].
        first: its first position.
        below: depth that bounds the sources of each target, ascending, int64, [n].
    """
    top, stop, frozen = int(below[-1]), first + len(gradient), sources.frozen
    pieces = pieces_of(sources, 0 if frozen.mixes(top) else first, stop, top)
    sweep = _Sweep(sources, gradient, first, below)
    for run in together(reversed(pieces), _width(len(below))):
        made = _empty(gradient, gradient.shape[1], run)
        column = 0
        for piece in run:
            sweep.down_to(piece.depth)
            sweep.read(piece, made.weights[:, column : column + piece.width])
            column += piece.width
        yield made


class _Sweep:
    """Gradients of targets with respect to the residual stream, from the top of a model down."""

    def __init__(self, sources: Sources, gradient: Tensor, first: int, below: Tensor) -> None:
        self._sources, self._below = sources, below
        self._seeds, self._first = gradient, first
        self._stop = first + len(gradient)
        self._begin = gradient.shape[1]
        """Targets from this one on have been reached"""
        self._gradient = torch.zeros_like(gradient)
        """Gradient of the residual stream behind the module at `_depth`"""
        self._depth = int(below[-1]) - 1
        self._held: list[tuple[Tensor, int]] = []
        """What modules let through that is not yet added, and its first position"""
        self._reach()

    def down_to(self, depth: int) -> None:
        """Go down to behind the module at a depth; 0 is behind the embeddings."""
        while self._depth > depth:
            module = self._sources.frozen.module(self._depth)
            if module.passes:
                self._held.append(self._through(module))
            layer, is_mlp = divmod(module.depth - 1, 2)
            if not (is_mlp and layer in self._sources.frozen.parallel):
                while self._held:  # else attention reads what the MLP reads
                    self._add(*self._held.pop())
            self._depth -= 1
            self._reach()

    def _reach(self) -> None:
        """Begin with the targets whose sources are of this depth at most."""
        begin = int(torch.searchsorted(self._below, self._depth, right=True))
        if begin < self._begin:
            new, beside = slice(begin, self._begin), len(self._gradient) - len(self._seeds)
            self._gradient[beside:, new] += self._seeds[:, new]
            self._begin = begin

    def read(self, piece: Piece, weights: Tensor) -> None:
        """Fill in what nodes of this depth contribute, [n, width]."""
        gradient = self._gradient[:, self._begin :]
        weights = weights[self._begin :]
        if piece.bias is not None:
            written = _bias(self._sources.frozen, piece.depth)[self._first : self._stop]
            weights[:, 0] = torch.einsum("pnd,pd->n", gradient, written)
            weights = weights[:, 1:]
        for at in range(self._first, self._stop, POSITIONS):
            stop = min(at + POSITIONS, self._stop)
            some = self._sources.between(piece.depth, at, stop)
            if not len(some):
                continue
            vectors = self._sources.vectors(piece.depth, some)
            column = some.start - piece.these.start
            for position, mine in _runs(self._sources.nodes.position[some.start : some.stop]):
                columns = slice(column + mine.start, column + mine.stop)
                weights[:, columns] = gradient[position - self._first] @ vectors[mine].T

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
