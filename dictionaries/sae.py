"""Sparse autoencoders: activations of one site as the few features that make them up.

    f     = act(W_E (x - b_O) + b_E)
    x_hat = f W_O + b_O

Source: Gao et al. 2024, arXiv:2406.04093, whose b_pre is b_O here.
"""

from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from .linear import LinearDictionary
from .linear_config import SaeConfig


class Sae(LinearDictionary):
    """Sparse autoencoder of one site; see `LinearDictionary` for its parameters."""

    kind: ClassVar[str] = "sae"
    Config = SaeConfig
    config: SaeConfig

    def centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x less b_O, and b_E."""
        centre = self.b_O.detach()
        # 0, with the gradient of b_O as a sum over features and not over tokens
        nought = F.linear(centre - self.b_O, self.W_E.detach())
        return x - centre, self.b_E + nought

    def rescale_(self, x_scale: float, y_scale: float) -> Self:
        """Change units in place; see `Dictionary.rescale_`.

        Raises:
            ValueError: the scales differ, though an SAE reads what it writes.
        """
        if x_scale != y_scale:
            raise ValueError(f"the scales are {x_scale} and {y_scale}; an SAE has one")
        return super().rescale_(x_scale, y_scale)
