"""Change of units: a Lorsa's weights for inputs and outputs that are scaled."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .config import LorsaConfig


@torch.no_grad()
def rescale_(
    tensors: Mapping[str, Tensor], config: LorsaConfig, x_scale: float, y_scale: float
) -> None:
    """Change units in place: y_hat(x_scale * x) becomes y_scale times what y_hat(x) was.

    Exact to the bit for powers of two.

    Args:
        tensors: the parameters of a Lorsa, and its threshold, by name.
        config: the Lorsa's.
        x_scale, y_scale: factors of input and output.
    """
    for name in ("W_Q", "W_K", "W_V", *(("W_G",) if config.gate else ())):
        tensors[name].div_(x_scale)
    for name in ("W_O", "b_O"):
        tensors[name].mul_(y_scale)
    if "threshold" in tensors and config.score_by_norm:  # z itself stays as it is
        tensors["threshold"].mul_(y_scale)
