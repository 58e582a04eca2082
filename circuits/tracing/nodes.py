"""Nodes of a trace: what writes to the residual stream on a prompt, and the logits.

Embeddings, features that fire, what dictionaries miss (errors), biases, logits. Their order is that
of the model: what a node depends on comes before it.
"""

from dataclasses import dataclass, fields

from torch import Tensor

KINDS = ("embed", "feature", "error", "bias", "logit")
"""Names of the kinds of nodes; a node's `kind` is an index of this."""
EMBED, FEATURE, ERROR, BIAS, LOGIT = range(len(KINDS))
EVERYWHERE = -1
"""Position of a bias, which acts at every position."""
NOBODY = -1
"""Run, or feature, of nodes that have none."""


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """The nodes of a prompt, a struct of arrays on the CPU, each [n].

    They are sorted by depth, position, kind and feature.
    """

    kind: Tensor
    """Index of KINDS, int8"""
    depth: Tensor
    """Place in the model, int16: 0 the embeddings, 1 + 2 l what the attention of layer l writes,
    2 + 2 l what its MLP writes, 2 n_layers + 1 the logits"""
    position: Tensor
    """Token, counted from 0, int32; EVERYWHERE of a bias"""
    run: Tensor
    """Index of the dictionary among those of the trace, int16; NOBODY without one"""
    feature: Tensor
    """Feature's id, or token id of embeddings and logits, int64; NOBODY without one"""
    value: Tensor
    """Activation of a feature; a logit less the mean logit; 1 of others; float32"""

    def __len__(self) -> int:
        return len(self.kind)

    def of(self, chosen: Tensor | slice) -> "Nodes":
        """Return some of the nodes, by their indices, int64, or a mask; sorted if these are."""
        return Nodes(*(getattr(self, field.name)[chosen] for field in fields(self)))


def attention_depth(layer: int) -> int:
    """Return the depth of what a layer's attention writes."""
    return 1 + 2 * layer


def mlp_depth(layer: int) -> int:
    """Return the depth of what a layer's MLP writes."""
    return 2 + 2 * layer


def logit_depth(n_layers: int) -> int:
    """Return the depth of the logits of a model of so many layers."""
    return 2 * n_layers + 1
