"""Check of a kept evaluation: whether it has all that the tables show, in the right form."""

from typing import Any

from ..dictionaries.choices import SITES

NUMBER = (int, float)
MAYBE = (int, float, type(None))
VARIANTS = ("replaced", "zero_ablated", "mean_ablated", "random")
LOSSES = ("original", *VARIANTS)
POSITIONS = ("fvu", "nmse", "cosine", "l0", "variance")
FORM: dict[str, Any] = {
    "kind": (str,),
    "layer": (int,),
    "reads": [(str,)],
    "writes": [(str,)],
    **dict.fromkeys(("fvu", "fvu_usual", "nmse", "cosine"), MAYBE),
    **dict.fromkeys(("outlier_fraction", "l0", "dead_fraction"), NUMBER),
    **dict.fromkeys(("n_tokens", "dead_window_tokens"), (int,)),
    "random": dict.fromkeys(("fvu", "fvu_usual"), MAYBE),
    "frequency_histogram": {"log10_from": [(int,)], "n_features": [(int,)], "n_silent": (int,)},
    "by_position": {name: [MAYBE] for name in POSITIONS},
}
"""Types of the measures on the store, by name; of a list that of each item"""
LOSS_FORM: dict[str, Any] = {
    **dict.fromkeys(LOSSES, NUMBER),
    **dict.fromkeys(("increase_se", "recovered_from_zero", "recovered_from_mean"), MAYBE),
    **dict.fromkeys(("kl", "top1_agreement"), dict.fromkeys(VARIANTS, NUMBER)),
    "by_position": {name: [NUMBER] for name in LOSSES},
    "n_tokens": (int,),
}
"""The same of `cross_entropy`"""


def is_whole(measured: dict[str, Any]) -> bool:
    """Return whether an evaluation of one run has all that its tables show."""
    losses = measured.get("cross_entropy")
    if not _fits(measured, FORM) or not (losses is None or _fits(losses, LOSS_FORM)):
        return False
    histogram = measured["frequency_histogram"]
    lengths = {len(values) for values in measured["by_position"].values()}
    bins = (len(histogram["log10_from"]), len(histogram["n_features"]))
    return measured["kind"] in SITES and len(lengths) == 1 and bins[0] == bins[1]


def _fits(value: Any, form: Any) -> bool:
    """Return whether a value has a form: one of some types, a list or a dict of forms."""
    if isinstance(form, tuple):
        return isinstance(value, form) and not isinstance(value, bool)
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(each, form[0]) for each in value)
    return isinstance(value, dict) and all(
        name in value and _fits(value[name], form[name]) for name in form
    )
