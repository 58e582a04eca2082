"""What a step minimises, as one module for accelerate to wrap."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model import Lorsa


class Outcome(NamedTuple):
    """What a forward of the objective gives."""

    loss: Tensor
    """Minimised; weight * mean (y_hat - y)^2 over the tokens that count and all channels"""
    acts: Tensor
    """Of the heads that fired, [batch, seq, top_k], without a gradient; 0 where a token does not
    count"""
    ids: Tensor
    """[batch, seq, top_k]"""


class Objective(nn.Module):
    """The loss of a Lorsa on some sequences."""

    def __init__(self, lorsa: Lorsa) -> None:
        super().__init__()
        self.lorsa = lorsa

    def forward(
        self, x: Tensor, y: Tensor, top_k: int, counted: Tensor | None = None, weight: float = 1.0
    ) -> Outcome:
        """Return the loss.

        Args:
            x, y: the layer's input and output, scaled, [batch, seq, d_model].
            top_k: heads that fire per token in this step.
            counted: which tokens count, bool, [batch, seq]; None counts all.
            weight: of these tokens among those of all processes.
        """
        acts, ids = self.lorsa.encode(x, top_k=top_k)
        error = (self.lorsa.decode(acts, ids) - y).square()
        fired = acts.detach() if counted is None else acts.detach() * counted[..., None]
        return Outcome(weight * masked_mean(error, counted), fired, ids)


def masked_mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean over the tokens that count and all channels; 0 if none counts.

    Args:
        values: [batch, seq, d_model].
        counted: bool, [batch, seq]; None counts all.
    """
    if counted is None:
        return values.mean()
    per_token = values.mean(dim=-1)  # [batch, seq]
    return torch.where(counted, per_token, 0).sum() / counted.sum().clamp(min=1)
