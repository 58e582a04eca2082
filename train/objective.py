"""What a step minimises, as one module for accelerate to wrap."""

from typing import NamedTuple

from torch import Tensor, nn

from ..model import Lorsa


class Outcome(NamedTuple):
    """What a forward of the objective gives."""

    loss: Tensor
    """Minimised; mean (y_hat - y)^2 over these tokens and channels"""
    acts: Tensor
    """Of the heads that fired, [batch, seq, top_k], without a gradient"""
    ids: Tensor
    """[batch, seq, top_k]"""


class Objective(nn.Module):
    """The loss of a Lorsa on some sequences."""

    def __init__(self, lorsa: Lorsa) -> None:
        super().__init__()
        self.lorsa = lorsa

    def forward(self, x: Tensor, y: Tensor, top_k: int) -> Outcome:
        """Return the loss.

        Args:
            x, y: the layer's input and output, scaled, [batch, seq, d_model].
            top_k: heads that fire per token in this step.
        """
        acts, ids = self.lorsa.encode(x, top_k=top_k)
        loss = (self.lorsa.decode(acts, ids) - y).square().mean()
        return Outcome(loss, acts.detach(), ids)
