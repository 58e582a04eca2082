"""Trust nothing that was read off a model: recompute its attention and compare.

The relative error ||y - attention(x)|| / ||y|| of the first batch shows whether geometry and
weights are what the layer really does, for any family of models.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model import AttentionGeometry, LayerWeights, layer_attention
from ..store import read_weights as stored_weights
from .errors import HarvestError
from .sites import AttentionSite, read_weights

LIMIT = 1e-2
"""Of the relative error: what half precision explains."""
LIMIT_FP32 = 1e-4
CHECKED_SEQS = 2


class SelfCheck(NamedTuple):
    """How well y is recomputed from x."""

    errors: dict[int, float]
    """Relative error of every layer"""
    limit: float
    """A layer above it is not understood"""


@torch.no_grad()
def check_geometry(
    batch: dict[int, tuple[Tensor, Tensor]],
    weights: dict[int, LayerWeights],
    geometries: dict[int, AttentionGeometry],
    *,
    required: bool,
) -> SelfCheck:
    """Recompute y from x for every layer, in fp32.

    Args:
        batch: x and y of every layer, each [n, n_ctx, d_model].
        weights, geometries: of every layer.
        required: whether a layer above the limit is an error.

    Raises:
        HarvestError: naming the worst layer.
    """
    errors = {}
    limit = LIMIT_FP32
    for layer, (x, y) in batch.items():
        x, y = x[:CHECKED_SEQS], y[:CHECKED_SEQS]
        limit = LIMIT_FP32 if y.dtype == torch.float32 else LIMIT
        again = layer_attention(x.float(), weights[layer].to(torch.float32), geometries[layer])
        errors[layer] = float((again - y.float()).norm() / y.float().norm())
    worst = max(errors, key=lambda layer: _nan_last(errors[layer]))
    if required and not errors[worst] <= limit:
        raise HarvestError(
            f"layer {worst}: attention recomputed from what was read of the model differs by "
            f"{errors[worst]:.1e} (allowed {limit:.0e}); lorsa does not understand this model. "
            "--no-selfcheck harvests it all the same, for init='random' only"
        )
    return SelfCheck(errors, limit)


def require_same_weights(model: Any, sites: list[AttentionSite], store: Path) -> None:
    """Raise HarvestError unless a model's attention weights are those of a store."""
    for site in sites:
        mine = read_weights(model, site).present()
        for name, theirs in stored_weights(store, site.layer).items():
            if not torch.equal(mine[name].detach().cpu().to(theirs.dtype), theirs):
                raise HarvestError(
                    f"{store} was made with another model: layer {site.layer} has another {name}; "
                    "give the model that `lorsa store info` names"
                )


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value
