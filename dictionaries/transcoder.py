"""Transcoders: an MLP's output as features of its input, of which few fire.

    f     = act(W_E x + b_E)
    y_hat = f W_O + b_O (+ W_skip x)

Source: Dunefsky et al. 2024, arXiv:2406.11944; the skip connection: Paulo et al. 2025,
arXiv:2501.18823.
"""

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import LinearDictionary
from .linear_config import TranscoderConfig


class Transcoder(LinearDictionary):
    """Transcoder of one MLP; see `LinearDictionary` for its parameters.

    Besides, with `skip`: W_skip, [d_model, d_model]; rows are outputs.
    """

    kind: ClassVar[str] = "transcoder"
    Config = TranscoderConfig
    config: TranscoderConfig
    W_skip: nn.Parameter | None

    def __init__(self, config: TranscoderConfig, *, backend: str = "auto") -> None:
        """Make a transcoder of zeros; see `Dictionary`."""
        super().__init__(config, backend=backend)
        if not config.skip:
            self.register_parameter("W_skip", None)

    def beside(self, x: Tensor | None) -> Tensor:
        """Return b_O, [d_model]; with a skip connection b_O + W_skip x, [batch, seq, d_model]."""
        if self.W_skip is None:
            return self.b_O
        if x is None:
            raise ValueError("this transcoder has a skip connection; decode needs x as well")
        return F.linear(self.as_input(x), self.W_skip, self.b_O)

    def rescale_(self, x_scale: float, y_scale: float) -> Self:
        """Change units in place; see `Dictionary.rescale_`."""
        super().rescale_(x_scale, y_scale)
        if self.W_skip is not None:
            with torch.no_grad():
                self.W_skip.mul_(y_scale / x_scale)
        return self
