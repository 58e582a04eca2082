"""MLP of a layer as a plain function of its weights and geometry, and how a model's is read.

    gated:  y = (act(x W_gate^T + b_gate) * (x W_up^T + b_up)) W_down + b_down
    plain:  y = act(x W_up^T + b_up) W_down + b_down

A neuron is a row of each weight: what it reads, and what it writes. Shapes say which projection is
which; where they leave a choice (how a fused projection is cut, which of two is the gate, which
function acts) every reading is offered, and the self-check takes the closest if it is close enough.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Block
from .projections import Unreadable, weight_rows

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


def mlp_readings(model: Any, block: Block) -> Iterator[MlpReading]:
    """Yield every way in which a block's MLP may be understood.

    Weights are in the model's dtype, on its device.

    Raises:
        Unreadable: the MLP is a mixture of experts, or its projections are not those of an MLP.
    """
    for weights, activation in product(mlp_weights(model, block), ACTIVATIONS):
        d_mlp, d_model = weights.W_up.shape
        gated = weights.W_gate is not None
        geometry = MlpGeometry(d_model=d_model, d_mlp=d_mlp, activation=activation, gated=gated)
        yield MlpReading(geometry, weights)


def mlp_weights(model: Any, block: Block) -> list[MlpWeights]:
    """Return a block's MLP weights, in every way that they may be meant.

    Raises:
        Unreadable: as `mlp_readings`.
    """
    if block.mlp is None or block.reads is None:
        raise Unreadable("it is not found")
    _require_projections(model, block)
    *first, last = (model.get_submodule(name) for name in block.parts)
    down, b_down = weight_rows(last).detach().T, _bias(last)
    rows, biases = [weight_rows(part).detach() for part in first], [_bias(part) for part in first]
    d_mlp, sizes = len(down), [len(r) for r in rows]
    if sizes == [d_mlp]:
        return [MlpWeights(rows[0], down, b_up=biases[0], b_down=b_down)]
    if sizes == [2 * d_mlp]:
        cuts = [(cut(rows[0]), _cut_bias(cut, biases[0])) for cut in (_halves, _interleaved)]
    elif sizes == [d_mlp, d_mlp]:
        cuts = [((rows[0], rows[1]), (biases[0], biases[1]))]
    else:
        shapes = [tuple(each.shape) for each in (*rows, down.T)]
        raise Unreadable(f"its projections, of shapes {shapes}, are not those of an MLP")
    return [
        MlpWeights(two[up], down, two[gate], b[up], b[gate], b_down)
        for two, b in cuts
        for gate, up in ((0, 1), (1, 0))
    ]


def _require_projections(model: Any, block: Block) -> None:
    """Raise Unreadable unless an MLP's matrices are those of its projections, each used once."""
    around = model.get_submodule(block.reads)
    named = [*around.named_parameters()]
    if any("expert" in name for name, _ in [*named, *around.named_modules()]):
        raise Unreadable("it is a mixture of experts")
    matrices = [name for name, parameter in named if parameter.ndim > 1]
    if (
        block.mlp is not None
        and block.mlp.name.startswith(block.reads or "")
        and (len(matrices) != len(block.parts))
    ):
        raise Unreadable(f"it has weights besides its projections ({', '.join(matrices)})")
    if len(block.parts) < 2:
        raise Unreadable(f"{type(around).__name__} has fewer than two projections")


def _bias(projection: Any) -> Tensor | None:
    bias = getattr(projection, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


Two = tuple[Tensor, Tensor]


def _halves(fused: Tensor) -> Two:
    """Cut rows of which one projection's come first."""
    first, second = fused.chunk(2)
    return first, second


def _interleaved(fused: Tensor) -> Two:
    """Cut rows that come in pairs, one of each projection."""
    return fused[::2], fused[1::2]


def _cut_bias(cut: Callable[[Tensor], Two], bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if bias is None else cut(bias)
