"""Places of a harvest's sites in the loaded model, and the calls that it needs besides."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ..language.blocks import AttentionSite, Block, Spot, attention_sites, find_blocks
from ..language.capture import Capture, ends_of
from ..sites import Site
from ..store.site_facts import OWNER, SiteFacts, owner_of
from ..store.spelling import layers_of
from .chosen import deriving, facts_of, parallel_in, present
from .config import HarvestConfig


class Hooks(NamedTuple):
    """Places of sites in a model."""

    model: Any
    """transformers' causal language model"""
    spots: dict[Site, Spot]
    """Module and side of each site"""
    attention: list[AttentionSite]
    """Attention layers that are to be understood"""
    blocks: dict[int, Block]
    """Blocks that are to be understood: those whose MLP or residual stream is harvested"""

    @property
    def sites(self) -> list[Site]:
        """The sites, in order."""
        return list(self.spots)

    def capture(self) -> Capture:
        """Return hooks that catch the sites, and calls of the attention layers."""
        return Capture(self.model, self.attention, spots=self.spots)

    def first_look(self) -> Capture:
        """Return hooks that catch all of it, with calls of whole blocks and all of their sites."""
        spots = dict(self.spots)
        for layer, block in self.blocks.items():
            spots |= {Site(layer, name): spot for name, spot in block.spots.items()}
        names = {layer: block.name for layer, block in self.blocks.items()}
        return Capture(self.model, self.attention, spots=spots, blocks=names)


def find_hooks(
    config: HarvestConfig,
    model: Any,
    sites: Collection[Site],
    there: Mapping[Site, SiteFacts] | None = None,
) -> Hooks:
    """Find sites in a loaded model.

    Args:
        config: the request.
        model: transformers' causal language model.
        sites: sites to catch; a resid_mid that is not there is left out.
        there: sites that the store has already.

    Raises:
        HarvestError: a site is not there.
        AttachError: the layers' attention is not found.
    """
    layers = layers_of(sites)
    if all(OWNER[site.name] == "attention" for site in [*sites, *(there or {})]):
        found = attention_sites(model, layers)
        ends = ends_of(found)
        return Hooks(model, {site: ends[site] for site in sites}, found, {})
    blocks = find_blocks(model)
    spots = {s: blocks[s.layer].spots[s.name] for s in present(sites, blocks, config)}
    facts = facts_of(spots, dict.fromkeys(spots, 1), there or {}, config.outputs)
    needed = {owner_of(site) for site in spots} | deriving(facts, parallel_in(blocks))
    attention = [
        AttentionSite(n, at.name, model.get_submodule(at.name))
        for n in layers
        if f"{n}.attention" in needed and (at := blocks[n].attention) is not None
    ]
    others = {n: blocks[n] for n in layers if needed & {f"{n}.mlp", f"{n}.block"}}
    return Hooks(model, spots, attention, others)
