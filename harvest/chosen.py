"""Sites of a harvest: those that are asked for, and how few of them give the others.

With --outputs derive as few arrays are stored as give all sites: attn_in of a layer's attention,
mlp_in of its MLP, and resid_in alone where sites of more than one module are asked for.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import HarvestError
from ..language.blocks import Block
from ..sites import SITE_NAMES, Site, parse_site_names
from ..store.site_facts import OWNER, Derivation, SiteFacts
from .config import HarvestConfig

SOURCES = {
    "attn_in": ("resid_in",),
    "attn_out": ("attn_in", "resid_in"),
    "mlp_in": ("resid_in",),
    "mlp_out": ("mlp_in", "resid_in"),
    "resid_in": (),
    "resid_mid": ("resid_in",),
    "resid_out": ("resid_in",),
}
"""Sites from which each can be derived, the best first."""
ROOTS = {"attention": "attn_in", "mlp": "mlp_in"}
"""Site that gives all others of one module."""


def asked_names(sites: str, outputs: str) -> tuple[str, ...]:
    """Return the names of the sites that are asked for, with the one that gives the others.

    Args:
        sites: names or groups, as `HarvestConfig.sites`.
        outputs: "store", or "derive".
    """
    names = parse_site_names(sites)
    if outputs == "store" or len(names) == 1:
        return names
    modules = {OWNER[name] for name in names}
    root = ROOTS.get(modules.pop(), "resid_in") if len(modules) == 1 else "resid_in"
    return tuple(name for name in SITE_NAMES if name in names or name == root)


def named_alone(config: HarvestConfig) -> set[str]:
    """Return the parts of --sites, groups as they are: what is named is not left out in silence."""
    return {part.strip() for part in config.sites.split(",")}


def present(
    sites: Iterable[Site], blocks: Mapping[int, Block], config: HarvestConfig
) -> list[Site]:
    """Return those of some sites that a model has: all but a resid_mid that is not there.

    Args:
        sites: sites that are wanted.
        blocks: what is known of the layers' sites; of others, all are taken to be there.
        config: the request.

    Raises:
        HarvestError: a layer lacks another site, or a resid_mid that is asked for by its name.
    """
    by_name = named_alone(config)
    found = []
    for site in sites:
        why = blocks[site.layer].lacks.get(site.name) if site.layer in blocks else None
        if why is None:
            found.append(site)
        elif site.name != "resid_mid" or site.name in by_name:
            what = f"layer {site.layer} " if site.name != "resid_mid" else f"{site}: the layer "
            raise HarvestError(f"{what}{why}; leave it out of --layers, or choose other --sites")
    return found


def left_out(wanted: Collection[Site], there: Collection[Site]) -> str | None:
    """Return a line on the resid_mid that some layers lack; None if all that is wanted is there."""
    if set(wanted) <= set(there):
        return None
    return (
        "resid_mid is left out: attention and MLP of this model read the same residual stream, "
        "so there is none between them"
    )


def facts_of(
    sites: Iterable[Site], widths: Mapping[Site, int], there: Mapping[Site, SiteFacts], outputs: str
) -> dict[Site, SiteFacts]:
    """Return what a manifest says of new sites: which are stored, and whence the others come.

    Args:
        sites: the new sites.
        widths: their widths.
        there: sites that the store has already.
        outputs: "store", or "derive".
    """
    new = set(sites)
    stored = {site for site, facts in there.items() if facts.is_stored}
    found: dict[Site, SiteFacts] = {}
    for site in sorted(new, key=lambda each: (each.layer, each.name != "resid_in", each.place)):
        sources = [Site(site.layer, name) for name in SOURCES[site.name]]
        source = next((each for each in sources if each in stored), None)
        if outputs == "store" or source is None:
            stored.add(site)
            found[site] = SiteFacts(widths[site])
        else:
            by = "block" if source.name == "resid_in" else OWNER[source.name]
            found[site] = SiteFacts(widths[site], Derivation((source,), f"{site.layer}.{by}"))
    return {site: found[site] for site in sorted(found, key=lambda each: each.place)}


def deriving(facts: Mapping[Site, SiteFacts], parallel: Collection[int] = ()) -> set[str]:
    """Return the modules whose geometry some sites need: 12.attention, 12.mlp, 12.block.

    Args:
        facts: what the manifest says of the sites.
        parallel: layers whose MLP reads the residual stream that their attention reads.
    """
    found: set[str] = set()
    for site, about in facts.items():
        if about.derived is None:
            continue
        found.add(about.derived.by)
        if not about.derived.by.endswith(".block"):
            continue
        if site.name != "attn_in" and not (site.layer in parallel and OWNER[site.name] == "mlp"):
            found.add(f"{site.layer}.attention")
        if site.name in ("mlp_out", "resid_out"):
            found.add(f"{site.layer}.mlp")
    return found


def parallel_in(blocks: Mapping[int, Block]) -> set[int]:
    """Return the layers whose attention and MLP read the same residual stream."""
    return {layer for layer, block in blocks.items() if block.is_parallel}


def lacks(modules: Mapping[str, Any], site: Site) -> bool:
    """Return whether a store knows that its model has no such site."""
    return site.name in modules.get(f"{site.layer}.block", {}).get("lacks", [])
