"""A language model's layers as a store keeps them."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..errors import StoreError, reason_of
from ..sites import Ports, Site
from ..store.fixed import read_weights
from ..store.manifest import Manifest
from ..store.places import Place
from ..store.read.reader import ActivationStore
from ..store.read.rows import Seqs
from ..store.read.stored import Derive
from .attention import LayerWeights, Reading, layer_attention
from .block import BlockReading, Derivation
from .geometry import AttentionGeometry
from .mlp import MlpGeometry, MlpWeights, layer_mlp

N_TRIED = 2
"""Tokens on which stored weights are tried."""


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


def stored_mlp(
    weights: dict[str, Tensor], geometry: dict[str, Any], device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """Return a stored layer's MLP as a function from mlp_in to mlp_out, float32 on a device."""
    placed = MlpWeights(**weights).to(device, torch.float32)
    shape = MlpGeometry.from_dict(geometry)

    @torch.no_grad()
    def mlp(x: Tensor) -> Tensor:
        return layer_mlp(x, placed, shape)

    return mlp


def deriver(store: ActivationStore, device: torch.device | str) -> Derive:
    """Return what computes the sites that a store does not keep, from those that it keeps.

    A module's weights are read and placed when it is first asked for.

    Args:
        store: the store.
        device: device of the activations.
    """
    functions = {"attention": stored_attention, "mlp": stored_mlp}

    @cache
    def function(layer: int, kind: str, width: int) -> Callable[[Tensor], Tensor]:
        module = f"{layer}.{kind}"
        geometry = store.manifest.modules[module]["geometry"]
        made = functions[kind](store.weights(module), geometry, device)
        _require_fit(made, torch.zeros(1, N_TRIED, width, device=device), module)
        return made

    def run(layer: int, kind: str, x: Tensor) -> Tensor:
        return function(layer, kind, x.shape[-1])(x)

    @cache
    def block(layer: int) -> BlockReading | None:
        return _stored_block(store, layer, device)

    def derived(stored: Mapping[Site, Tensor], wanted: Sequence[Site]) -> dict[Site, Tensor]:
        known: dict[tuple[int, tuple[Site, ...]], Derivation] = {}
        found = {}
        for site in wanted:
            origin = store.manifest.sites[site].derived
            sources = () if origin is None else origin.sites
            layer = site.layer  # the same values, whatever else is read
            if (layer, sources) not in known:
                for source in sources:
                    _require_width(stored[source], source, block(layer))
                known[layer, sources] = Derivation(
                    {source.name: stored[source] for source in sources},
                    block=block(layer),
                    attention=partial(run, layer, "attention"),
                    mlp=partial(run, layer, "mlp"),
                )
            found[site] = known[layer, sources].site(site.name)
            if (width := found[site].shape[-1]) != store.width(site):
                raise ValueError(f"{site} has the width {width}")
        return found

    @torch.no_grad()
    def derive(stored: Mapping[Site, Tensor], wanted: Sequence[Site]) -> dict[Site, Tensor]:
        try:
            return derived(stored, wanted)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            sites = ", ".join(map(str, wanted))
            raise StoreError(
                f"{store.root}: {sites} cannot be derived from what it has of the layer "
                f"({type(error).__name__}: {reason_of(error)}); harvest the layer again"
            ) from None

    return derive


def _stored_block(
    store: ActivationStore, layer: int, device: torch.device | str
) -> BlockReading | None:
    """Return sums and norms of a stored layer; None where they are unknown."""
    module = f"{layer}.block"
    facts = store.manifest.modules.get(module)
    if facts is None or facts["geometry"] is None:
        return None
    placed = {name: weight.to(device) for name, weight in store.weights(module).items()}
    return BlockReading.stored(facts["geometry"], placed)


def _require_fit(function: Callable[[Tensor], Tensor], x: Tensor, module: str) -> None:
    """Raise ValueError unless the weights of a module have the shapes that its geometry means."""
    try:
        fits, why = function(x).shape == x.shape, ""
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, IndexError, RuntimeError) as error:
        fits, why = False, f": {reason_of(error)}"
    if not fits:
        raise ValueError(f"the weights of {module} do not fit its geometry{why}")


def _require_width(x: Tensor, site: Site, block: BlockReading | None) -> None:
    """Raise ValueError if a site is not as wide as the residual stream of its block."""
    if block is not None and x.shape[-1] != block.geometry.d_model:
        raise ValueError(f"{site} is {x.shape[-1]} wide, its block {block.geometry.d_model}")


def site_reader(
    store: ActivationStore, site: Site, device: torch.device | str
) -> Callable[[Seqs], Tensor]:
    """Return a function from sequences to a site of them, stored or derived.

    Args:
        store: the store.
        site: the site.
        device: device of the activations, float32, [n, n_ctx, width].
    """
    ports, derive = Ports((site,), (site,)), deriver(store, device)

    def read(seqs: Seqs) -> Tensor:
        return store.stored(ports, seqs).on(device, derive).x

    return read
