"""Tables of an evaluation."""

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from .words import (
    NOUNS,
    fact_table,
    list_table,
    number,
    numbers,
    place_of,
    share,
    short,
    things_of,
    words,
)

RECOVERED = ("recovered_from_zero", "recovered_from_mean")
SHOWN_LOSSES = ("original", "replaced", "random")


def eval_tables(result: dict[str, Any]) -> RenderableType:
    """Return what `lorsa eval` prints, of one run or of several."""
    if "runs" in result:
        return _runs_table(result)
    title = f"{place_of(result)} of {result['run']}"
    return Group(fact_table(title, quality_rows(result)), _positions_table(result))


def quality_rows(result: dict[str, Any]) -> dict[str, str]:
    """Return the measures of one run in words."""
    random, things, noun = result["random"], things_of(result["kind"]), NOUNS[result["kind"]]
    rows = {
        "FVU": number(result["fvu"]),
        **_of_usual(result),
        "  of random features": number(random["fvu"])
        + (f", {number(random['fvu_usual'])} without" if result.get("outlier_fraction") else ""),
        "NMSE, cosine": f"{short(result['nmse'])}, {short(result['cosine'])}",
        "L0": f"{result['l0']:.1f}",
        f"silent {things}": f"{result['dead_fraction']:.1%} did not fire on the held-out tokens",
        f"firing {things}": _frequencies(result["frequency_histogram"]),
        "held-out tokens": f"{result['n_tokens']:,}",
    }
    if (ce := result["cross_entropy"]) is None:
        return rows
    increase = ce["replaced"] - ce["original"]
    se = "" if ce["increase_se"] is None else f", standard error {ce['increase_se']:.4f}"
    return rows | {
        "cross-entropy": f"{ce['original']:.4f} nats per token, {ce['n_tokens']:,} tokens",
        f"  with {noun}": f"{ce['replaced']:.4f} ({increase:+.4f}{se}){_nearness(ce, 'replaced')}",
        "  random features": f"{ce['random']:.4f}{_nearness(ce, 'random')}",
        "  zero-ablated": f"{ce['zero_ablated']:.4f}{_nearness(ce, 'zero_ablated')}",
        "  mean-ablated": f"{ce['mean_ablated']:.4f}{_nearness(ce, 'mean_ablated')}",
        "loss recovered": f"{share(ce['recovered_from_zero'])} against zero-ablation, "
        f"{share(ce['recovered_from_mean'])} against mean-ablation",
    }


def _of_usual(result: dict[str, Any]) -> dict[str, str]:
    """Return the FVU without tokens of outlier norm, where there are some."""
    if not (outliers := result.get("outlier_fraction")):
        return {}
    without = f"without the {outliers:.2%} longer than 10 medians"
    return {"  of usual tokens": f"{number(result['fvu_usual'])}, {without}"}


def _nearness(ce: dict[str, Any], name: str) -> str:
    return f", KL {ce['kl'][name]:.4f}, same top token {ce['top1_agreement'][name]:.1%}"


def _frequencies(histogram: dict[str, Any]) -> str:
    """Spell how many features fire how often: those of a decade, the most frequent first."""
    parts = [
        f"{n:,} on {10.0**low:.{max(-low - 2, 0)}%}-{10.0 ** (low + 1):.{max(-low - 3, 0)}%}"
        for low, n in zip(histogram["log10_from"], histogram["n_features"], strict=True)
        if n
    ]
    return ", ".join(reversed(parts)) + (" of the tokens" if parts else "none")


def _positions_table(result: dict[str, Any]) -> Table:
    """Show the measures in buckets of positions, each twice as wide as the one before."""
    by_position, ce = result["by_position"], result["cross_entropy"]
    names = ["position", "FVU", "NMSE", "cosine", "L0"]
    names += [] if ce is None else ["cross-entropy", f"with {NOUNS[result['kind']]}", "random"]
    table = list_table("by position in the sequence", *numbers(*names))
    for some in _buckets(len(by_position["fvu"])):
        part = {name: values[some.start : some.stop] for name, values in by_position.items()}
        last = some.stop - 1
        row = [
            f"{some.start}" if len(some) == 1 else f"{some.start}-{last}",
            short(_mean(part["fvu"], part["variance"])),
            *(short(_mean(part[name])) for name in ("nmse", "cosine")),
            short(_mean(part["l0"]), ".1f"),
        ]
        if ce is not None:
            losses = [ce["by_position"][name][some.start : some.stop] for name in SHOWN_LOSSES]
            row += [short(_mean(values)) for values in losses]
        table.add_row(*row)
    return table


def _buckets(n_ctx: int) -> Iterable[range]:
    """Yield 0, 1, 2-3, 4-7, ... below n_ctx."""
    start = 0
    while start < n_ctx:
        stop = min(max(2 * start, 1), n_ctx)
        yield range(start, stop)
        start = stop


def _mean(values: list[float | None], weights: list[float | None] | None = None) -> float | None:
    """Return the mean of the values that are there."""
    pairs = zip(values, weights or [1.0] * len(values), strict=True)
    there = [(value, weight) for value, weight in pairs if value is not None and weight]
    total = sum(weight for _, weight in there)
    return sum(value * weight for value, weight in there) / total if there else None


def _runs_table(result: dict[str, Any]) -> RenderableType:
    """Show a row for each run, and one for all together."""
    together = result["together"]
    original = result["runs"][0]["cross_entropy"] or (together and together["cross_entropy"])
    shown = ["fvu"]
    names = ["FVU", "random"]
    if any(run.get("outlier_fraction") for run in result["runs"]):
        shown, names = ["fvu", "fvu_usual"], [*names, "FVU*", "random*"]
    names += ["NMSE", "cosine", "L0", "silent"]
    if original is not None:
        names += ["loss", "random", "from zero", "from mean", "KL", "same top"]
    table = list_table("measured", words("of"), *numbers(*names), words("run"))
    for run in result["runs"]:
        cells = [
            place_of(run),
            *(short(of[name]) for name in shown for of in (run, run["random"])),
            *(short(run[name]) for name in ("nmse", "cosine")),
            f"{run['l0']:.1f}",
            f"{run['dead_fraction']:.1%}",
        ]
        losses = _loss_cells(run["cross_entropy"]) if original is not None else []
        table.add_row(*cells, *losses, escape(run["run"]))
    if together is not None:
        row = [
            "all",
            *("-" * (4 + 2 * len(shown))),
            *_loss_cells(together["cross_entropy"]),
            "all of these at once",
        ]
        table.add_row(*row, style="bold")
    if original is not None:
        table.caption = (
            f"loss: cross-entropy with it in place less {original['original']:.4f} nats without, "
            f"{original['n_tokens']:,} tokens; random: of as many random features, of the same L0; "
            "from zero, from mean: share of what ablation costs that is recovered; KL and same top "
            "token: of the original's predictions"
        )
    if len(shown) > 1:
        note = "*: without tokens longer than 10 medians"
        table.caption = f"{table.caption}; {note}" if table.caption else note
    return table


def _loss_cells(ce: dict[str, Any] | None) -> list[str]:
    if ce is None:
        return ["-"] * (2 + len(RECOVERED) + 2)
    return [
        *(f"{ce[name] - ce['original']:+.4f}" for name in ("replaced", "random")),
        *(short(ce[name], ".1%") for name in RECOVERED),
        f"{ce['kl']['replaced']:.4f}",
        f"{ce['top1_agreement']['replaced']:.1%}",
    ]
