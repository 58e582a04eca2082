"""Words for sets of sites: layers 0-3, or layers 0-3 (attn,mlp)."""

from collections.abc import Iterable

from ..sites import SITE_GROUPS, Site, spell_site_names
from .layers import spell_layers

ATTENTION = SITE_GROUPS["attn"]
"""Sites that a set of layers means where none are named."""


def names_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """Return the names of some sites, each once."""
    return tuple(dict.fromkeys(site.name for site in sites))


def layers_of(sites: Iterable[Site]) -> list[int]:
    """Return the layers of some sites, ascending."""
    return sorted({site.layer for site in sites})


def spell_sites(sites: Iterable[Site], *, named: bool = False) -> str:
    """Return what people read: layers 0-3, of their attention, or layers 0-3 (mlp), 5 (attn,mlp).

    Layers with the same sites are named together, in the order of the first of each. `named`
    names the attention's sites as well: layers 0-3 (attn).
    """
    by_layer: dict[int, set[str]] = {}
    for site in sorted(sites, key=lambda site: site.place):
        by_layer.setdefault(site.layer, set()).add(site.name)
    layers: dict[str, list[int]] = {}
    for layer, names in by_layer.items():
        layers.setdefault(spell_site_names(names), []).append(layer)
    word = "layer" if len(by_layer) == 1 else "layers"
    if list(layers) == ["attn"] and not named:
        return f"{word} {spell_layers(layers['attn'])}"
    told = (f"{spell_layers(some)} ({names})" for names, some in layers.items())
    return f"{word} {', '.join(told)}"
