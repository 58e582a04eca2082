"""Settings by kind of dictionary: which kinds have which, and the defaults of their own.

Imports nothing heavy.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ..dictionaries.choices import SITES

KINDS = tuple(SITES)
"""Kinds of dictionaries that can be trained."""
ALL = "all"
"""What is asked for in place of a kind: every kind whose sites a store has."""
OWN = {
    "n_ov_heads": ("lorsa",),
    "n_qk_heads": ("lorsa",),
    "n_features": ("sae", "transcoder"),
    "prefixes": ("sae", "transcoder"),
    "site": ("sae",),
    "skip": ("transcoder",),
}
"""Settings that not every kind has, and the kinds that have them."""
PLACE = ("layer", "kind", "site")
"""Settings that say which activations a dictionary reads and writes."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "lorsa": {"init": "layer", "lr": 1e-3, "decay_frac": 0.6, "loss_mask": "none"},
    "sae": {
        "init": "data",
        "lr": 2e-3,
        "decay_frac": 0.6,
        "loss_mask": "norm>10x",
        "site": "resid_out",
    },
    "transcoder": {"init": "data", "lr": 2e-3, "decay_frac": 0.6, "loss_mask": "none"},
}
"""Values of settings that were not given, by kind; see docs/recipe.md."""
INITS = {
    "lorsa": ("layer", "layer-weighted", "random"),
    "sae": ("data",),
    "transcoder": ("data",),
}
"""Weights to start from, by kind."""


def kinds_of(text: str) -> tuple[str, ...]:
    """Return the kinds that a kind, or "all", stands for.

    Raises:
        ValueError: there is no such kind.
    """
    if text not in (*KINDS, ALL):
        raise ValueError(f"kind is {text!r}; allowed: {', '.join(KINDS)} or {ALL}")
    return KINDS if text == ALL else (text,)


def by_place(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return rows of runs in groups of the same layer, kind and site.

    FVUs of others are no better or worse: they are of other activations.

    Args:
        rows: settings and results of each run, by name; what no run differs in may be left out.
    """
    places: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        places.setdefault(tuple(row.get(name) for name in PLACE), []).append(row)
    return list(places.values())


def kinds_with(setting: str) -> tuple[str, ...]:
    """Return the kinds that have a setting."""
    return OWN.get(setting, KINDS)
