"""MLP of a layer as a plain function of its weights and geometry.

    gated:  y = (act(x W_gate^T + b_gate) * (x W_up^T + b_up)) W_down + b_down
    plain:  y = act(x W_up^T + b_up) W_down + b_down

A neuron is a row of each weight: what it reads, and what it writes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}
"""Functions that act in MLPs, by name."""
CHUNK_ELEMENTS = 1 << 25
"""Hidden activations that are in memory at once, 128 MB in float32; more tokens go in chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpGeometry:
    """Shape of an MLP, without its weights."""

    d_model: int
    d_mlp: int
    """Neurons"""
    activation: str
    """One of ACTIVATIONS"""
    gated: bool
    """Whether the activation of one projection multiplies another"""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation is {self.activation!r:.80}; allowed: {allowed}")

    def to_dict(self) -> dict[str, Any]:
        """Return the geometry as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MlpGeometry":
        """Read what `to_dict` wrote."""
        return cls(**data)


class MlpWeights(NamedTuple):
    """Parameters of an MLP; W_gate and b_* are None where it has none."""

    W_up: Tensor
    """[d_mlp, d_model]"""
    W_down: Tensor
    """[d_mlp, d_model]"""
    W_gate: Tensor | None = None
    """[d_mlp, d_model]"""
    b_up: Tensor | None = None
    """[d_mlp]"""
    b_gate: Tensor | None = None
    """[d_mlp]"""
    b_down: Tensor | None = None
    """[d_model]"""

    def to(self, *args: Any) -> "MlpWeights":
        """Return the weights with every tensor moved or cast as `Tensor.to` does."""
        return MlpWeights(**{name: w.to(*args) for name, w in self.present().items()})

    def present(self) -> dict[str, Tensor]:
        """Return the tensors that the MLP has, by name."""
        return {name: w for name, w in self._asdict().items() if w is not None}


class MlpReading(NamedTuple):
    """One way to understand an MLP."""

    geometry: MlpGeometry
    weights: MlpWeights


def layer_mlp(x: Tensor, weights: MlpWeights, geometry: MlpGeometry) -> Tensor:
    """Recompute the MLP's output from its input.

    Args:
        x: input after the norm, [..., d_model], dtype and device of the weights.
        weights: parameters of the MLP.
        geometry: its shape.

    Returns:
        The output before any norm that the block puts after it, [..., d_model].
    """
    rows = x.reshape(-1, geometry.d_model)
    step = max(1, CHUNK_ELEMENTS // geometry.d_mlp)
    parts = [neurons(some, weights, geometry) for some in rows.split(step)]
    return torch.cat([F.linear(h, weights.W_down.T, weights.b_down) for h in parts]).view(x.shape)


def neurons(x: Tensor, weights: MlpWeights, geometry: MlpGeometry) -> Tensor:
    """Return the activations of an MLP's neurons, [..., d_mlp], for x [..., d_model]."""
    act = ACTIVATIONS[geometry.activation]
    up = F.linear(x, weights.W_up, weights.b_up)
    if weights.W_gate is None:
        return act(up)
    return act(F.linear(x, weights.W_gate, weights.b_gate)) * up
