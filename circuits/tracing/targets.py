"""Targets of a trace in batches: the vectors by which features and goals read the stream.

    transcoder   e^T (reads(stream[p])) + b_E
    Lorsa        sum over k of pattern[q, k] gate[q] (w_V^T reads(stream[k]) + b_V)
    SAE          e^T (attention(reads(stream)) - b_O)[p] + b_E     attention: the model's own
    goal         vector^T final(stream[p]) + bias

What the norm's own bias adds is a constant of the target. So is all that an SAE of an MLP reads,
for there is no linear path to it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...dictionaries.linear import LinearDictionary
from ...dictionaries.lorsa.module import Lorsa
from ...dictionaries.sae import Sae
from ...errors import AnalyzeError
from .frozen import Attended, Frozen, Module
from .nodes import FEATURE, KINDS, LOGIT, Nodes
from .sources import Sources
from .sweep import Batch, Contributions, contributed, swept

MOST = 4096
"""Targets of a batch at most."""
SWEPT = 1 << 25
"""Entries of gradients that are in memory at once, 128 MiB in float32."""
MOST_QUERIES = 64
"""Tokens whose targets of a Lorsa are in a batch at most, for its patterns take memory."""


class Found(NamedTuple):
    """Contributions to some of the targets."""

    rows: Tensor
    """Which of the targets, int64, [n]"""
    made: Iterator[Contributions]
    """Contributions of all nodes that have any, some of the nodes at a time"""
    constant: Tensor
    """What no node makes of them, [n]"""


@torch.no_grad()
def found_of(sources: Sources, targets: Tensor) -> Iterator[Found]:
    """Yield contributions to targets, a batch at a time, in any order.

    Args:
        sources: the nodes of a run.
        targets: features and logits among them, int64, [m].

    Raises:
        AnalyzeError: a target is neither.
    """
    nodes = sources.nodes.of(targets)
    if wrong := set(nodes.kind.tolist()) - {FEATURE, LOGIT}:
        raise AnalyzeError(
            f"a node of kind {KINDS[min(wrong)]} is no target; features and logits are"
        )
    alone: list[Tensor] = []
    for depth in nodes.depth.unique().tolist():
        rows = (nodes.depth == depth).nonzero()[:, 0]
        rows = rows[nodes.position[rows].argsort(stable=True)]
        module = None if depth == sources.frozen.end else sources.frozen.module(depth)
        if module is not None and isinstance(module.dictionary, Lorsa):
            yield from _of_lorsa(sources, module, nodes, rows)
        elif module is not None and isinstance(module.dictionary, Sae):
            yield from _of_sae(sources, module, nodes, rows)
        else:
            alone.append(rows)
    if alone:
        yield from _of_one_token(sources, targets, torch.cat(alone))


def _of_lorsa(sources: Sources, module: Module, nodes: Nodes, rows: Tensor) -> Iterator[Found]:
    """Yield contributions to heads of a Lorsa, rows by position."""
    lorsa, attended = module.dictionary, Attended.of(module)
    assert isinstance(lorsa, Lorsa)
    for mine in _cut(sources, nodes.position[rows], module.below, mixes=True):
        at, heads = _placed(sources, nodes.of(rows[mine]))
        shares = attended.shares(at, heads)
        stop = shares.shape[1]
        ids, which = heads.unique(return_inverse=True)
        read = lorsa.directions(ids).read
        constant = shares.sum(dim=1) * (lorsa.b_V[ids] + module.reads.constant(read))[which]
        batch = Batch(
            vectors=module.reads.back(read),
            which=which,
            shares=shares * module.reads.scale[:stop],
            first=0,
            below=torch.full((len(at),), module.below),
            reach=at.cpu(),
        )
        yield Found(rows[mine], contributed(sources, batch), constant)


def _of_sae(sources: Sources, module: Module, nodes: Nodes, rows: Tensor) -> Iterator[Found]:
    """Yield contributions to features of an SAE, rows by position."""
    sae, reads, path = module.dictionary, module.reads, module.path
    assert isinstance(sae, Sae)
    if path is None:  # an MLP's output, of which nothing is linear
        yield Found(rows, iter(()), nodes.value[rows].to(module.x))
        return
    nothing = torch.zeros_like(module.x) if reads.bias is None else reads.bias.expand_as(module.x)
    rest = path.output(nothing) - sae.b_O
    for mine in _cut(sources, nodes.position[rows], module.below, mixes=True):
        at, ids = _placed(sources, nodes.of(rows[mine]))
        read = sae.directions(ids).read
        first, stop = int(at[0]), int(at[-1]) + 1
        of_output = read.new_zeros(stop - first, len(at), read.shape[1])
        of_output[at - first, torch.arange(len(at), device=at.device)] = read
        of_input, first = path.back(of_output, first)
        gradient = reads.back(of_input) * reads.scale[first:stop, None, None]
        below = torch.full((len(at),), module.below)
        constant = (read * rest[at]).sum(dim=1) + sae.b_E[ids]
        yield Found(rows[mine], swept(sources, gradient, first, below), constant)


def _placed(sources: Sources, nodes: Nodes) -> tuple[Tensor, Tensor]:
    """Return positions and features of nodes, int64, on the run's device."""
    device = sources.frozen.embedded.device
    return nodes.position.long().to(device), nodes.feature.to(device)


def _cut(sources: Sources, position: Tensor, below: int, *, mixes: bool) -> Iterator[slice]:
    """Yield slices of targets, by position, whose contributions fit into a block.

    Args:
        sources: the nodes.
        position: of the targets, ascending, [m].
        below: depth that bounds their sources.
        mixes: whether they read tokens before their own.
    """
    d_model, begin = sources.frozen.embedded.shape[1], 0
    while begin < len(position):
        first = int(position[begin])
        end = int(torch.searchsorted(position, first + (MOST_QUERIES if mixes else 1)))
        stop = int(position[end - 1]) + 1
        n = MOST
        if not sources.frozen.is_thin(below):
            n = min(n, SWEPT // ((stop if mixes else 1) * d_model))
        end = min(end, begin + max(1, n))
        yield slice(begin, end)
        begin = end


class _Reads(NamedTuple):
    """What targets that read one token read of the residual stream there."""

    vectors: Tensor
    """[n, d_model], times the norm's scale"""
    constant: Tensor
    """[n]"""


def _of_one_token(sources: Sources, targets: Tensor, rows: Tensor) -> Iterator[Found]:
    """Yield contributions to features of transcoders and goals, rows by depth."""
    frozen, nodes = sources.frozen, sources.nodes.of(targets)
    below = _bounds(frozen, nodes.depth)
    mixes_at = torch.tensor([frozen.mixes(each) for each in range(frozen.end + 1)])
    deep = mixes_at[below[rows]]
    still = rows[~deep]
    still = still[nodes.position[still].argsort(stable=True)]  # of one token, those of all depths
    groups = [(still, False)] if len(still) else []
    for depth in below[rows[deep]].unique().tolist():
        mine = rows[deep][below[rows[deep]] == depth]
        groups.append((mine[nodes.position[mine].argsort(stable=True)], True))
    for group, mixes in groups:
        top = int(below[group].max())
        for cut in _cut(sources, nodes.position[group], top, mixes=mixes):
            some = group[cut]
            yield _read_once(sources, targets[some], some, below[some])


def _bounds(frozen: Frozen, depth: Tensor) -> Tensor:
    """Return the depths that bound the sources of targets of some depths, int64."""
    bounds = [0, *(module.below for module in frozen.modules), frozen.end]
    return torch.tensor(bounds)[depth.long()]


def _read_once(sources: Sources, targets: Tensor, rows: Tensor, below: Tensor) -> Found:
    """Return contributions to targets that read one token each, by depth.

    Args:
        sources: the nodes.
        targets: the targets among them, [n].
        rows: which of all targets they are, [n].
        below: depths that bound their sources, ascending, [n].
    """
    reads, position = _reads_of(sources, targets), sources.nodes.position[targets].long()
    first, stop, n = int(position.min()), int(position.max()) + 1, len(targets)
    shares = reads.vectors.new_zeros(n, stop - first)
    shares[torch.arange(n), position - first] = 1
    which = torch.arange(n, device=shares.device)
    batch = Batch(reads.vectors, which, shares, first, below)
    return Found(rows, contributed(sources, batch), reads.constant)


def _reads_of(sources: Sources, targets: Tensor) -> _Reads:
    """Return what features of transcoders and goals read."""
    frozen, nodes = sources.frozen, sources.nodes.of(targets)
    vectors = frozen.embedded.new_empty(len(targets), frozen.embedded.shape[1])
    constant = frozen.embedded.new_empty(len(targets))
    for depth in nodes.depth.unique().tolist():
        mine = (nodes.depth == depth).nonzero()[:, 0]
        at, ids = _placed(sources, nodes.of(mine))
        if depth == frozen.end:
            first = len(sources.nodes) - len(frozen.goals)
            goals = [frozen.goals[int(target) - first] for target in targets[mine]]
            norm, read = frozen.final, torch.stack([goal.vector for goal in goals])
            bias = torch.tensor([goal.bias for goal in goals]).to(read)
        else:
            module = frozen.module(depth)
            assert isinstance(module.dictionary, LinearDictionary)
            norm, read = module.reads, module.dictionary.directions(ids).read
            bias = module.dictionary.b_E[ids]
        vectors[mine] = norm.back(read) * norm.scale[at, None]
        constant[mine] = bias + norm.constant(read)
    return _Reads(vectors, constant)
