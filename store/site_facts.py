"""What a manifest says of each site and of each module, and where their files lie.

layers/12/mlp_in            a site's activations; its scale, channel and norm lie beside it
weights/12/W_Q              parameters of 12.attention
weights/12/mlp/W_gate       parameters of 12.mlp, and alike of 12.block
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..sites import SITE_GROUPS, Site

MODULES = {"attn": "attention", "mlp": "mlp", "resid": "block"}
"""Name of the module of each group of sites, in the order in which they are listed."""
OWNER = {name: MODULES[group] for group, names in SITE_GROUPS.items() for name in names}
"""Name of the module of each site."""
PAIR = ("attn_in", "attn_out")
"""Sites whose norms format 1 keeps in one array, and their order in it."""
_MODULE = re.compile(rf"(0|[1-9][0-9]{{0,8}})\.({'|'.join(MODULES.values())})")


class Derivation(NamedTuple):
    """Origin of a site that is not stored."""

    sites: tuple[Site, ...]
    """Stored sites that it is computed from"""
    by: str
    """Module that computes it, such as 12.attention"""


class SiteFacts(NamedTuple):
    """What a manifest says of a site."""

    width: int
    """Width of an activation"""
    derived: Derivation | None = None
    """Origin of the site where it is not stored; None where it is"""
    in_pair: bool = False
    """Whether its norms are a column of layers/<l>/norms, as format 1 keeps them"""

    @property
    def is_stored(self) -> bool:
        """Whether the activations are on disk."""
        return self.derived is None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of a manifest of format 2."""
        derived = None
        if self.derived is not None:
            derived = {"from": [str(site) for site in self.derived.sites], "by": self.derived.by}
        return {"width": self.width, "derived": derived} | (
            {"norms": "pair"} if self.in_pair else {}
        )

    def require_whole(
        self, site: Site, sites: Mapping[Site, "SiteFacts"], modules: Mapping[str, Any]
    ) -> None:
        """Raise ValueError unless the facts of a site fit the others of its store."""
        if type(self.width) is not int or not 1 <= self.width < 1 << 31:
            raise ValueError(f"width of {site} is {self.width!r}; allowed: 1 or more")
        if self.in_pair and site.name not in PAIR:
            raise ValueError(f"norms of {site} are in no pair")
        if owner_of(site) not in modules:
            raise ValueError(f"{site} is of {owner_of(site)}, which is not there")
        if self.derived is None:
            return
        if not self.derived.sites or self.derived.by not in modules:
            raise ValueError(f"{site} is derived by {self.derived.by!r:.60}, which is not there")
        for source in self.derived.sites:
            if source not in sites or not sites[source].is_stored:
                raise ValueError(f"{site} is derived from {source}, which is not stored")


def read_site(text: str, facts: Any) -> tuple[Site, SiteFacts]:
    """Return a site and its facts as a manifest of format 2 has them.

    Raises:
        ValueError, KeyError, TypeError: they are of another form.
    """
    if not isinstance(facts, dict) or facts.get("norms") not in (None, "pair"):
        raise ValueError(f"{text} is {facts!r:.60}")
    derived = facts["derived"]
    if derived is not None:
        sites = tuple(Site.parse(source) for source in derived["from"])
        derived = Derivation(sites, derived["by"])
    return Site.parse(text), SiteFacts(facts["width"], derived, "norms" in facts)


def require_module(module: str, facts: Any) -> None:
    """Raise ValueError unless a module has a name and weights that can be."""
    if not _MODULE.fullmatch(module) or not isinstance(facts, dict):
        raise ValueError(f"{module!r:.60} is no module")
    names, parts = facts["weights"], facts.get("parts", [])
    if not _are_texts(names) or not all(name.isidentifier() for name in names):
        raise ValueError(f"{module} has weights {names!r:.60}")
    if not _are_texts(parts) or not set(MODULES.values()).isdisjoint(names):
        raise ValueError(f"{module} has weights {names!r:.60} and parts {parts!r:.60}")


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, str) for each in values)


def module_place(module: str) -> tuple[int, int]:
    """Return what modules are sorted by: layer, then the order of MODULES."""
    layer, _, name = module.partition(".")
    return int(layer), list(MODULES.values()).index(name)


def owner_of(site: Site) -> str:
    """Return the module that a site belongs to: 12.attention of 12.attn_in."""
    return f"{site.layer}.{OWNER[site.name]}"


def needed_modules(sites: Mapping[Site, SiteFacts], modules: Mapping[str, Any]) -> set[str]:
    """Return which of some modules some sites need: their own, and those that derive them.

    A module may name others that it is made of, as its "parts".
    """
    found = {owner_of(site) for site in sites}
    found |= {facts.derived.by for facts in sites.values() if facts.derived is not None}
    ahead = list(found)
    while ahead:
        parts = set(modules.get(ahead.pop(), {}).get("parts", [])) - found
        found |= parts
        ahead += parts
    return found & modules.keys()


def weights_at(module: str) -> str:
    """Return the folder of a module's parameters; attention's are those of the layer itself."""
    layer, _, name = module.partition(".")
    return f"weights/{layer}" if name == "attention" else f"weights/{layer}/{name}"


def scale_of(array: str) -> str:
    """Return the name of the token scales of an int8 array, given that array's name."""
    return f"{array}_scale"


def channel_of(array: str) -> str:
    """Return the name of the channel scales of an int8 array, given that array's name."""
    return f"{array}_channel"
