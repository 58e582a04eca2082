"""The precondition of a merge: stores of the same model, sites, weights and encoding."""

from typing import Any

import torch
from torch import Tensor

from ...errors import StoreError
from ...sites import Site
from ..read.reader import ActivationStore
from ..site_facts import SiteFacts, channel_of
from ..spelling import spell_sites

SAME = ("n_ctx", "dtype", "compression")
SAME_MODEL = ("id", "revision", "dtype")
SAME_CORPUS = ("packing", "bos")


def require_mergeable(a: ActivationStore, b: ActivationStore) -> None:
    """Raise StoreError, naming the field that differs, unless two stores can be merged."""
    first, second = a.manifest, b.manifest
    facts: list[tuple[str, Any, Any]] = [
        (name, getattr(first, name), getattr(second, name)) for name in SAME
    ]
    facts.append(("sites", spell_sites(a.sites), spell_sites(b.sites)))
    for site in (each for each in first.sites if each in second.sites):
        one, other = first.sites[site], second.sites[site]
        facts.append((f"width of {site}", one.width, other.width))
        facts.append((f"origin of {site}", _origin(one), _origin(other)))
    facts += [(f"model {n}", first.model.get(n), second.model.get(n)) for n in SAME_MODEL]
    facts += [(f"corpus {n}", first.corpus.get(n), second.corpus.get(n)) for n in SAME_CORPUS]
    facts.append(("modules", list(first.modules), list(second.modules)))
    facts.append(("tokenizer", first.tokenizer, second.tokenizer))
    for name, ours, theirs in facts:
        if ours != theirs:
            raise StoreError(
                f"{a.root} and {b.root} cannot be merged: {name} is {_short(ours)} and "
                f"{_short(theirs)}"
            )
    for module, facts_of in first.modules.items():
        if facts_of.get("geometry") != second.modules[module].get("geometry"):
            raise _refusal(a, b, f"the geometry of {module}")
        mine, others = a.weights(module), b.weights(module)
        if mine.keys() != others.keys() or not all(torch.equal(mine[n], others[n]) for n in mine):
            raise _refusal(a, b, f"a weight of {module}")
    scales, as_well = channels_of(a), channels_of(b)
    for site in scales:
        if not torch.equal(scales[site], as_well[site]):
            raise StoreError(
                f"{a.root} and {b.root} cannot be merged: {channel_of(site.path)} differs, which "
                "each int8 store takes from its first sequences; harvest both texts as bfloat16 "
                "or into one store"
            )


def channels_of(store: ActivationStore) -> dict[Site, Tensor]:
    """Return the scales of int8's channels by site, [width]; empty for other dtypes."""
    return {site: c for site in store.sites if (c := store.channel(site)) is not None}


def _origin(facts: SiteFacts) -> str:
    if facts.derived is None:
        return "stored"
    return f"derived from {', '.join(map(str, facts.derived.sites))} by {facts.derived.by}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:56] + " ..."


def _refusal(a: ActivationStore, b: ActivationStore, what: str) -> StoreError:
    return StoreError(f"{a.root} and {b.root} cannot be merged: {what} differs; same model?")
