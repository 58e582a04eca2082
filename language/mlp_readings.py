"""MLPs of language models, read: which projection is which, and which function acts.

Shapes say which projection is which. Where they leave a choice (how a fused projection is cut,
which of two is the gate, which function acts) every reading is offered, and the self-check takes
the closest if it is close enough.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from torch import Tensor

from .blocks import Block
from .mlp import ACTIVATIONS, MlpGeometry, MlpReading, MlpWeights
from .projections import Unreadable, weight_rows


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
