"""Choices of a dictionary's settings, its kinds' sites and its files; imports nothing heavy."""

from ..sites import Ports, Site, ports_between

ACTIVATIONS = ("topk", "batchtopk", "jumprelu")
CONFIG = "config.json"
"""File of a dictionary's shape and origin, beside its weights."""
WEIGHTS = "lorsa.safetensors"

SITES = {"lorsa": ("attn_in", "attn_out"), "sae": None, "transcoder": ("mlp_in", "mlp_out")}
"""What each kind reads and writes; an SAE any one site."""


def ports_of(kind: str, layer: int, site: str | None = None) -> Ports:
    """Return the sites that a kind of dictionary reads and writes at a layer.

    Args:
        kind: a key of SITES.
        layer: counted from 0.
        site: of an SAE, one of SITE_NAMES.

    Raises:
        ValueError: an SAE without a site, or another kind with one.
    """
    its_own = SITES[kind]
    if its_own is not None and site is None:
        return ports_between(layer, *its_own)
    if its_own is None and site is not None:
        return ports_between(layer, site, site)
    least = f"a {kind} has its own" if its_own else "an SAE needs one, as resid_out"
    raise ValueError(f"site is {site!r}; {least}")


def place_of(kind: str, writes: Site) -> str:
    """Return the name of a dictionary's place: layer-12 of a Lorsa, else 12.mlp or 12.resid_out."""
    named = {"lorsa": f"layer-{writes.layer}", "transcoder": f"{writes.layer}.mlp"}
    return named.get(kind, str(writes))
