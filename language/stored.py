"""A language model's layers as a store keeps them."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..sites import Site
from ..store.fixed import read_weights
from ..store.manifest import Manifest
from ..store.places import Place
from ..store.read.reader import ActivationStore
from ..store.read.stored import Derive
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
    """Return geometry and weights of the attention of a store's layers, where they are known."""
    found = {}
    for layer in manifest.layers:
        facts = manifest.modules.get(f"{layer}.attention")
        if facts is not None and facts["geometry"] is not None:
            geometry = AttentionGeometry.from_dict(facts["geometry"])
            weights = LayerWeights(**read_weights(root, manifest, f"{layer}.attention"))
            found[layer] = Reading(geometry, weights)
    return found


def layer_geometry(layer: int, store: ActivationStore) -> AttentionGeometry:
    """Return the geometry of a stored layer; where it is unknown, plain heads of its sizes."""
    facts = store.manifest.modules[f"{layer}.attention"]
    if facts["geometry"] is not None:
        return AttentionGeometry.from_dict(facts["geometry"])
    n_heads, d_head = facts["heads"]["n_heads"], facts["heads"]["d_head"]
    return AttentionGeometry(
        d_model=store.width(Site(layer, "attn_in")),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        scale=float(d_head) ** -0.5,
    )


def deriver(store: ActivationStore, device: torch.device | str) -> Derive:
    """Return what computes the sites that a store does not keep, from those that it keeps.

    A module's weights are read and placed when it is first asked for.

    Args:
        store: the store.
        device: device of the activations.
    """

    @cache
    def attention(module: str) -> Callable[[Tensor], Tensor]:
        geometry = store.manifest.modules[module]["geometry"]
        return stored_attention(store.weights(module), geometry, device)

    def derive(stored: Mapping[Site, Tensor], wanted: Sequence[Site]) -> dict[Site, Tensor]:
        found = {}
        for site in wanted:
            derived = store.manifest.sites[site].derived
            assert derived is not None
            (source,) = derived.sites
            found[site] = attention(derived.by)(stored[source])
        return found

    return derive
