"""Manifests of format 1, which knew layers: x and y of each layer's attention.

They are read as sites, whose norms lie in pairs. What format 1 can say is written as format 1, so
that a store of it goes on and stays the same to the last byte.
"""

from collections.abc import Mapping
from typing import Any

from ..sites import Site
from .choices import OUTPUTS
from .site_facts import PAIR, Derivation, SiteFacts

ORDER = (
    *("uuid", "created", "lorsa_version", "model", "tokenizer", "corpus", "request", "n_seq"),
    *("n_ctx", "d_model", "shard_seqs", "dtype", "compression", "outputs", "layers"),
    *("held_out_shards", "checksums"),
)
"""Fields of a manifest of format 1, as it has them."""


def read_layers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest, given those of format 1.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: they are of another form.
    """
    outputs = content.get("outputs", OUTPUTS[0])
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs is {outputs!r}; allowed: {', '.join(OUTPUTS)}")
    sites: dict[Site, SiteFacts] = {}
    modules: dict[str, Any] = {}
    for text, facts in content["layers"].items():
        layer = Site.parse(f"{text}.{PAIR[0]}").layer
        sites |= pair_facts(layer, content["d_model"], outputs, in_pair=True)
        modules[f"{layer}.attention"] = facts
    kept = {n: v for n, v in content.items() if n not in ("d_model", "outputs", "layers")}
    return kept | {"sites": sites, "modules": modules}


def pair_facts(
    layer: int, width: int, outputs: str, *, in_pair: bool = False
) -> dict[Site, SiteFacts]:
    """Return the facts of a layer's attn_in and attn_out; the second stored or derived."""
    x, y = (Site(layer, name) for name in PAIR)
    derived = Derivation((x,), f"{layer}.attention") if outputs == "derive" else None
    return {x: SiteFacts(width, None, in_pair), y: SiteFacts(width, derived, in_pair)}


def write_layers(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fields of format 1, given those of a manifest; None where it cannot say them."""
    sites: dict[Site, SiteFacts] = content["sites"]
    layers = list(dict.fromkeys(site.layer for site in sites))
    if not layers or content["modules"].keys() != {f"{layer}.attention" for layer in layers}:
        return None
    width = next(iter(sites.values())).width
    for outputs in OUTPUTS:
        said: dict[Site, SiteFacts] = {}
        for layer in layers:
            said |= pair_facts(layer, width, outputs, in_pair=True)
        if said == sites:
            own = {str(layer): content["modules"][f"{layer}.attention"] for layer in layers}
            every = {**content, "d_model": width, "outputs": outputs, "layers": own}
            return {name: every[name] for name in ORDER}
    return None
