"""The definition of edges: the frozen model run forward, and its derivatives by autograd.

Every node has a share, 1, that multiplies what it writes. The frozen model is affine in them, so
the derivative of a target's pre-activation by a node's share is what that node adds to it.
Nothing here is meant to be quick.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...dictionaries.linear import LinearDictionary
from ...dictionaries.lorsa.module import Lorsa
from ...dictionaries.sae import Sae
from .frozen import Frozen, Module
from .nodes import BIAS, EMBED, ERROR, FEATURE, LOGIT, Nodes


class Reference(NamedTuple):
    """Contributions of all nodes to some targets."""

    weights: Tensor
    """[m, n_nodes]"""
    totals: Tensor
    """Pre-activations of the targets in the frozen model, [m]"""


def reference(frozen: Frozen, nodes: Nodes, targets: Tensor) -> Reference:
    """Return what every node adds to targets, by autograd.

    Args:
        frozen: a run of a language model.
        nodes: all of its nodes.
        targets: features and logits among them, int64, [m].
    """
    shares = torch.ones(len(nodes), dtype=frozen.embedded.dtype, requires_grad=True)
    replay = Replay(frozen, nodes, shares)
    totals = torch.stack([replay.pre_activations[int(target)] for target in targets])
    weights = [
        torch.autograd.grad(total, shares, retain_graph=True, allow_unused=True)[0]
        for total in totals
    ]
    nothing = torch.zeros_like(shares)
    rows = torch.stack([nothing if each is None else each for each in weights])
    return Reference(rows.detach(), totals.detach())


class Replay:
    """The frozen model run forward with a share of each node."""

    def __init__(self, frozen: Frozen, nodes: Nodes, shares: Tensor) -> None:
        """Run it.

        Args:
            frozen: a run of a language model.
            nodes: all of its nodes.
            shares: factor of what each node writes, [n_nodes].
        """
        self._frozen, self._nodes, self._shares = frozen, nodes, shares
        self.pre_activations: dict[int, Tensor] = {}
        """Pre-activation of each feature and goal, by node, []"""
        stream = frozen.embedded * self._shares_of(0, EMBED)[:, None]
        for attention, mlp in zip(frozen.modules[::2], frozen.modules[1::2], strict=True):
            is_parallel = (attention.depth - 1) // 2 in frozen.parallel
            added = self._added(attention, stream)
            stream, before = stream + added, stream
            stream = stream + self._added(mlp, before if is_parallel else stream)
        self.read = frozen.final.output(stream)
        """What the unembedding reads, [T, d_model]"""
        goals = self._mine(frozen.end, LOGIT)
        for node, goal in zip(goals.tolist(), frozen.goals, strict=True):
            self.pre_activations[node] = self.read[goal.position] @ goal.vector + goal.bias

    def _mine(self, depth: int, kind: int) -> Tensor:
        """Return the nodes of a depth and kind."""
        return ((self._nodes.depth == depth) & (self._nodes.kind == kind)).nonzero()[:, 0]

    def _shares_of(self, depth: int, kind: int) -> Tensor:
        return self._shares[self._mine(depth, kind)]

    def _added(self, module: Module, stream: Tensor) -> Tensor:
        """Return what a module adds to the residual stream that it reads, [T, d_model]."""
        x, nothing = module.reads.output(stream), module.reads.output(torch.zeros_like(stream))
        added = torch.zeros_like(stream)
        if module.passes and module.path is not None:
            passed = module.path.output(x) - module.path.output(nothing)
            added = module.writes.direction(passed) * module.writes.scale[:, None]
        if module.bias is not None:
            added = added + module.bias * self._shares_of(module.depth, BIAS)
        if module.error is not None:
            added = added + module.error * self._shares_of(module.depth, ERROR)[:, None]
        if module.dictionary is None:
            return added
        return added + self._of_features(module, x)

    def _of_features(self, module: Module, x: Tensor) -> Tensor:
        """Note the pre-activations of features; return what they add to the residual stream.

        Args:
            module: holds a dictionary.
            x: what the attention or the MLP reads, [T, d_model].
        """
        assert module.dictionary is not None
        assert module.code is not None
        mine = self._mine(module.depth, FEATURE)
        at, ids = self._nodes.position[mine].long(), self._nodes.feature[mine]
        every = _pre_activations(module, x)  # [T, n_features]
        for node, value in zip(mine.tolist(), every[at, ids], strict=True):
            self.pre_activations[node] = value
        acts = self._nodes.value[mine] * self._shares[mine]
        z = torch.zeros_like(every).index_put((at, ids), acts.to(x))
        y = z @ module.dictionary.W_O.detach()
        return module.writes.direction(y) * module.writes.scale[:, None]


def _pre_activations(module: Module, x: Tensor) -> Tensor:
    """Return the pre-activations of all features for what a module reads, [T, n_features]."""
    dictionary = module.dictionary
    if isinstance(dictionary, Lorsa):
        with torch.no_grad():
            pattern, gate = dictionary.pattern(module.x[None])[0], dictionary.gate(module.x)
        v = x @ dictionary.W_V.detach().T + dictionary.b_V.detach()
        grouped = v.unflatten(1, (len(pattern), -1))  # [T, n_qk_heads, group]
        z = torch.einsum("hqk,khg->qhg", pattern, grouped).flatten(1)
        return z if gate is None else z * gate
    assert isinstance(dictionary, LinearDictionary)
    W, b = dictionary.W_E.detach(), dictionary.b_E.detach()
    if isinstance(dictionary, Sae):
        y = module.x if module.path is None else module.path.output(x)
        return (y - dictionary.b_O.detach()) @ W.T + b
    return x @ W.T + b
