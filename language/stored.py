"""A language model's layers as a store keeps them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..store.fixed import read_weights
from ..store.manifest import Manifest
from ..store.places import Place
from ..store.read.reader import ActivationStore, Derive
from .attention import LayerWeights, Reading, layer_attention
from .geometry import AttentionGeometry


def stored_attention(
    weights: dict[str, Tensor], geometry: dict[str, Any], device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """Return a stored layer's attention as a function from x to y, in float32 on a device.

    Args:
        weights: parameters of the layer, from `ActivationStore.weights`.
        geometry: geometry of the layer, from the store's manifest.
        device: device of x and y.
    """
    placed = LayerWeights(**weights).to(device, torch.float32)
    shape = AttentionGeometry.from_dict(geometry)

    @torch.no_grad()
    def attend(x: Tensor) -> Tensor:
        return layer_attention(x, placed, shape)

    return attend


def stored_readings(root: Place, manifest: Manifest) -> dict[int, Reading]:
    """Return geometry and weights of a store's layers, of those where they are known."""
    found = {}
    for layer, facts in manifest.layers.items():
        if facts["geometry"] is not None:
            geometry = AttentionGeometry.from_dict(facts["geometry"])
            weights = LayerWeights(**read_weights(root, manifest, layer))
            found[layer] = Reading(geometry, weights)
    return found


def layer_geometry(layer: int, store: ActivationStore) -> AttentionGeometry:
    """Return the geometry of a stored layer; where it is unknown, plain heads of its sizes."""
    facts = store.manifest.layers[layer]
    if facts["geometry"] is not None:
        return AttentionGeometry.from_dict(facts["geometry"])
    n_heads, d_head = facts["heads"]["n_heads"], facts["heads"]["d_head"]
    return AttentionGeometry(
        d_model=store.manifest.d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        scale=float(d_head) ** -0.5,
    )


def deriver(layer: int, store: ActivationStore, device: torch.device | str) -> Derive | None:
    """Return the function from x to y of a store that derives y; None where it keeps y."""
    if store.manifest.outputs == "store":
        return None
    geometry = store.manifest.layers[layer]["geometry"]
    return stored_attention(store.weights(layer), geometry, device)
