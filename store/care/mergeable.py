"""The precondition of a merge: stores of the same model, layers, weights and encoding."""

from typing import Any

import torch
from torch import Tensor

from ...errors import StoreError
from ..arrays import channel_of, sites
from ..read.reader import ActivationStore

SAME = ("n_ctx", "d_model", "dtype", "compression", "outputs")
SAME_MODEL = ("id", "revision", "dtype")
SAME_CORPUS = ("packing", "bos")


def require_mergeable(a: ActivationStore, b: ActivationStore) -> None:
    """Raise StoreError, naming the field that differs, unless two stores can be merged."""
    first, second = a.manifest, b.manifest
    facts = [(name, getattr(first, name), getattr(second, name)) for name in SAME]
    facts.append(("layers", a.layers, b.layers))
    facts += [(f"model {n}", first.model.get(n), second.model.get(n)) for n in SAME_MODEL]
    facts += [(f"corpus {n}", first.corpus.get(n), second.corpus.get(n)) for n in SAME_CORPUS]
    facts.append(("tokenizer", first.tokenizer, second.tokenizer))
    for name, one, other in facts:
        if one != other:
            raise StoreError(
                f"{a.root} and {b.root} cannot be merged: {name} is {_short(one)} and "
                f"{_short(other)}"
            )
    for layer in a.layers:
        if first.layers[layer].get("geometry") != second.layers[layer].get("geometry"):
            raise _refusal(a, b, f"the geometry of layer {layer}")
        one, other = a.weights(layer), b.weights(layer)
        if one.keys() != other.keys() or not all(torch.equal(one[n], other[n]) for n in one):
            raise _refusal(a, b, f"a weight of layer {layer}")
    ours, theirs = channels_of(a), channels_of(b)
    for site in ours:
        if not torch.equal(ours[site], theirs[site]):
            raise StoreError(
                f"{a.root} and {b.root} cannot be merged: {channel_of(site)} differs, which each "
                "int8 store takes from its first sequences; harvest both texts as bfloat16 or "
                "into one store"
            )


def channels_of(store: ActivationStore) -> dict[str, Tensor]:
    """Return the scales of int8's channels by array, [d_model]; empty for other dtypes."""
    names = [site for layer in store.layers for site in sites(store.manifest, layer)]
    return {name: c for name in names if (c := store.channel(name)) is not None}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:56] + " ..."


def _refusal(a: ActivationStore, b: ActivationStore, what: str) -> StoreError:
    return StoreError(f"{a.root} and {b.root} cannot be merged: {what} differs; same model?")
