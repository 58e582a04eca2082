"""Edges of a trace: what each node adds to the pre-activation of a target, in closed form."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Incoming edges of some targets, a row each, on the CPU.

    total = constant + sum of weight over the row + rest_positive + rest_negative, but for rounding.
    """

    target: Tensor
    """Index of each target among the nodes, int32, [m]"""
    start: Tensor
    """Row i is source[start[i] : start[i + 1]], and weight alike, int64, [m + 1]"""
    source: Tensor
    """Index of each source among the nodes, the largest |weight| of a row first, int32, [e]"""
    weight: Tensor
    """What the source adds to the target's pre-activation, signed, float32, [e]"""
    rest_positive: Tensor
    """Sum of the positive contributions of all sources that are not listed, float32, [m]"""
    rest_negative: Tensor
    """Sum of the negative ones, at most 0, float32, [m]"""
    constant: Tensor
    """What no node makes: the target's own bias and that of the norm it reads through, float32,
    [m]"""
    total: Tensor
    """Pre-activation as the dictionary itself computes it, or the logit, float32, [m]"""
