"""What dictionaries read, which features fire, and what these read and write, as tensors."""

from typing import NamedTuple

from torch import Tensor

Input = Tensor | tuple[Tensor | None, ...]
"""Activations that a dictionary reads, or what its kind has made of them (`Projected`)."""


class Code(NamedTuple):
    """The features that fire, in as many slots as may: top_k, or max_l0 where top_k is a mean."""

    acts: Tensor
    """Activations, [batch, seq, slots]; 0 where the slot's feature does not fire"""
    ids: Tensor
    """Ids of the features, ascending, int32, [batch, seq, slots]"""


class Firing(NamedTuple):
    """The features that fire in training, and what their thresholds are trained by."""

    acts: Tensor
    """Activations, as in Code"""
    ids: Tensor
    """Ids of the features, as in Code"""
    edge: Tensor | None = None
    """Smallest score of a sequence that was to fire, [batch]; batchtopk only"""
    fires: Tensor | None = None
    """1 where a feature fires, else 0, [batch, seq, slots], with a gradient; jumprelu only"""


class Directions(NamedTuple):
    """What features read and write."""

    read: Tensor
    """Directions of x, [n, d_model]; of a Lorsa's heads those of the tokens attended to"""
    written: Tensor
    """Directions of y, [n, d_model]"""
