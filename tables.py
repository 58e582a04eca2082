"""Tables of what is known of Lorsas and their heads, and what all tables share."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from .store import spell_layers

RECOVERED = ("recovered_from_zero", "recovered_from_mean")
SHOWN_LOSSES = ("original", "lorsa")
MAINLY = 0.5
"""The score from which on a head is mainly of a type."""


def fact_table(title: str, rows: dict[str, str]) -> Table:
    """Return a table of names and values, escaped."""
    table = Table(
        "",
        Column(overflow="fold"),
        title=escape(title),
        title_justify="left",
        show_header=False,
        box=SIMPLE_HEAD,
    )
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table


def number(value: float | None) -> str:
    """Spell a measure of y."""
    return "undefined: y does not vary" if value is None else f"{value:.4f}"


def share(value: float | None) -> str:
    """Spell a share of the loss that ablation costs."""
    return "undefined (ablation costs nothing)" if value is None else f"{value:.1%}"


def eval_tables(result: dict[str, Any]) -> RenderableType:
    """Return what `lorsa eval` prints, of one run or of several."""
    if "runs" in result:
        return _runs_table(result)
    title = f"layer {result['layer']} of {result['run']}"
    return Group(fact_table(title, quality_rows(result)), _positions_table(result))


def quality_rows(result: dict[str, Any]) -> dict[str, str]:
    """Return the measures of one run in words."""
    rows = {
        "FVU": number(result["fvu"]),
        "NMSE, cosine": f"{_short(result['nmse'])}, {_short(result['cosine'])}",
        "L0": f"{result['l0']:.1f}",
        "silent heads": f"{result['dead_fraction']:.1%} did not fire on the held-out tokens",
        "firing heads": _frequencies(result["frequency_histogram"]),
        "held-out tokens": f"{result['n_tokens']:,}",
    }
    if (ce := result["cross_entropy"]) is None:
        return rows
    increase = ce["lorsa"] - ce["original"]
    se = "" if ce["increase_se"] is None else f", standard error {ce['increase_se']:.4f}"
    return rows | {
        "cross-entropy": f"{ce['original']:.4f} nats per token, {ce['n_tokens']:,} tokens",
        "  with Lorsa": f"{ce['lorsa']:.4f} ({increase:+.4f}{se}){_nearness(ce, 'lorsa')}",
        "  zero-ablated": f"{ce['zero_ablated']:.4f}{_nearness(ce, 'zero_ablated')}",
        "  mean-ablated": f"{ce['mean_ablated']:.4f}{_nearness(ce, 'mean_ablated')}",
        "loss recovered": f"{share(ce['recovered_from_zero'])} against zero-ablation, "
        f"{share(ce['recovered_from_mean'])} against mean-ablation",
    }


def _nearness(ce: dict[str, Any], name: str) -> str:
    return f", KL {ce['kl'][name]:.4f}, same top token {ce['top1_agreement'][name]:.1%}"


def _frequencies(histogram: dict[str, Any]) -> str:
    """Spell how many heads fire how often: those of a decade, the most frequent first."""
    parts = [
        f"{n:,} on {10.0**low:.{max(-low - 2, 0)}%}-{10.0 ** (low + 1):.{max(-low - 3, 0)}%}"
        for low, n in zip(histogram["log10_from"], histogram["n_heads"], strict=True)
        if n
    ]
    return ", ".join(reversed(parts)) + (" of the tokens" if parts else "none")


def _positions_table(result: dict[str, Any]) -> Table:
    """Show the measures in buckets of positions, each twice as wide as the one before."""
    by_position, ce = result["by_position"], result["cross_entropy"]
    table = Table(title="by position in the sequence", title_justify="left", box=SIMPLE_HEAD)
    names = ["position", "FVU", "NMSE", "cosine", "L0"]
    for name in names + ([] if ce is None else ["cross-entropy", "with Lorsa"]):
        table.add_column(name, justify="right", no_wrap=True)
    for some in _buckets(len(by_position["fvu"])):
        part = {name: values[some.start : some.stop] for name, values in by_position.items()}
        last = some.stop - 1
        row = [
            f"{some.start}" if len(some) == 1 else f"{some.start}-{last}",
            _short(_mean(part["fvu"], part["variance"])),
            *(_short(_mean(part[name])) for name in ("nmse", "cosine")),
            _short(_mean(part["l0"]), 1),
        ]
        if ce is not None:
            losses = [ce["by_position"][name][some.start : some.stop] for name in SHOWN_LOSSES]
            row += [_short(_mean(values)) for values in losses]
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


def _short(value: float | None, places: int = 4) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _runs_table(result: dict[str, Any]) -> RenderableType:
    """Show a row for each run, and one for all together."""
    table = Table(title="measured", title_justify="left", box=SIMPLE_HEAD)
    in_model = result["runs"][0]["cross_entropy"] is not None
    names = ["layer", "FVU", "NMSE", "cosine", "L0", "silent"]
    losses = ["loss", "from zero", "from mean", "KL", "same top"]
    for name in names + (losses if in_model else []):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("run", overflow="fold")
    for run in result["runs"]:
        cells = [
            str(run["layer"]),
            *(_short(run[name]) for name in ("fvu", "nmse", "cosine")),
            f"{run['l0']:.1f}",
            f"{run['dead_fraction']:.1%}",
        ]
        table.add_row(*cells, *_loss_cells(run["cross_entropy"]), escape(run["run"]))
    if (together := result["together"]) is not None:
        row = ["all", *"-----", *_loss_cells(together["cross_entropy"]), "all of these at once"]
        table.add_row(*row, style="bold")
    table.caption_justify = "left"
    if not in_model:
        return table
    original = result["runs"][0]["cross_entropy"]
    table.caption = (
        f"loss: cross-entropy with the Lorsa less {original['original']:.4f} nats without, on "
        f"{original['n_tokens']:,} tokens; from zero, from mean: share of what ablation costs that "
        "is recovered; KL and same top token: of the original's predictions"
    )
    return table


def _loss_cells(ce: dict[str, Any] | None) -> list[str]:
    if ce is None:
        return []
    return [
        f"{ce['lorsa'] - ce['original']:+.4f}",
        *("-" if ce[name] is None else f"{ce[name]:.1%}" for name in RECOVERED),
        f"{ce['kl']['lorsa']:.4f}",
        f"{ce['top1_agreement']['lorsa']:.1%}",
    ]


def ablate_tables(result: dict[str, Any]) -> RenderableType:
    """Return what `lorsa ablate` prints."""
    kept = {"keep": "stays", "drop": "is dropped: the Lorsa stands in for the layer"}
    rows = {
        "heads": f"{spell_layers(result['heads'])} {result['change']}",
        "Lorsa's error": f"{kept[result['error']]} (NMSE {result['prompt_nmse']:.3f} here)",
        "before": result["before"],
        "KL": f"{result['kl']:.4g} nats between the predictions before and after",
    }
    if result["silent"]:
        rows["silent"] = f"{spell_layers(result['silent'])} do not fire on this prompt"
    strongest = ", ".join(f"{head}: {act:.3g}" for head, act in result["strongest"].items())
    rows["strongest"] = f"{strongest or 'none'} (at the last token, of all heads)"
    title = f"layer {result['layer']} of {result['run']}, in {result['model']}"
    return Group(
        fact_table(title, rows),
        _prompt_table(result),
        _next_table("likeliest next tokens before", result["likeliest_before"]),
        _next_table("likeliest after", result["likeliest_after"]),
        _next_table("changed most", result["most_changed"]),
    )


def _prompt_table(result: dict[str, Any]) -> Table:
    table = Table(title="the prompt", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("position", justify="right")
    table.add_column("token", overflow="fold")
    table.add_column("heads that fire", overflow="fold")
    for name in ("loss of the next", "change", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for token in result["tokens"]:
        acts = ", ".join(f"{head}: {act:.3g}" for head, act in token["acts"].items())
        before, after = token["loss_before"], token["loss_after"]
        change = "-" if before is None else f"{after - before:+.4f}"
        cells = (_spelled(token), acts, _short(before), change, f"{token['kl']:.4f}")
        table.add_row(str(token["position"]), *cells, style="bold" if acts else None)
    return table


def _next_table(title: str, tokens: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("token", overflow="fold")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    spell: Callable[[float], str] = "{:.2%}".format
    for token in tokens:
        change = f"{token['after'] - token['before']:+.2%}"
        table.add_row(_spelled(token), spell(token["before"]), spell(token["after"]), change)
    return table


def _spelled(token: dict[str, Any]) -> str:
    """Show a token with its spaces and line ends, or its id without a tokenizer."""
    return str(token["id"]) if token["text"] is None else escape(repr(token["text"]))


def analyze_table(result: dict[str, Any]) -> Table:
    """Show how many heads are of each type."""
    n_fired = result["n_ov_heads"] - result["types"].get("silent", 0)
    rows = {
        "heads": f"{result['n_ov_heads']:,}, of which {n_fired:,} fired on {result['n_tokens']:,} "
        "tokens",
        **{name.replace("_", " "): f"{count:,}" for name, count in result["types"].items()},
        "time": spell_time(result["seconds"]),
        "analysis": result["analysis"],
    }
    if not result["with_model"]:
        rows["not done"] = "effects on logits, probes: give --model"
    return fact_table(f"heads of layer {result['layer']} of {result['run']}", rows)


def find_table(result: dict[str, Any]) -> Table:
    """Show heads of a type, each with what it is seen to do."""
    kind = result["type"].replace("_", "-")
    table = Table(title=f"{kind} heads", title_justify="left", box=SIMPLE_HEAD)
    for name in ("layer", "head", "score", "on text", "fires"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where it fires <> and what it reads []", overflow="fold")
    for head in result["heads"]:
        fires = "" if head["frequency"] is None else f"{head['frequency']:.3%}"
        table.add_row(
            str(head["layer"]),
            str(head["head"]),
            f"{head['score']:.2f}",
            "-" if head["score_on_text"] is None else f"{head['score_on_text']:.2f}",
            fires,
            escape("\n".join(head["evidence"] or ["a head of the language model itself"])),
        )
    table.caption = _score_in_words(kind, result["heads"])
    table.caption_justify = "left"
    return table


def _score_in_words(kind: str, heads: list[dict[str, Any]]) -> str:
    """Say what the scores of `find` are, and where the best of them is no such head."""
    if kind == "successor":
        told = "score: share of the ordinal words it reads whose next one it makes likeliest"
        return f"{told}; often of a single word, so look at the examples"
    spelled = {"probe": "random tokens that are repeated", "text": "text"}
    on = " or ".join(spelled[each] for each in sorted({head["measured_on"] for head in heads}))
    told = f"score: share of its reading that is of the type, on {on}"
    best = max(head["score"] for head in heads)
    few = f"; the best is {best:.2f}, so none is mainly {kind}"
    return told + (few if best < MAINLY else "")


def estimate_rows(result: dict[str, Any]) -> dict[str, str]:
    """Return in words what explaining heads takes."""
    key = "no key" if result["key"] is None else f"key from {result['key']}"
    before = f", {result['n_before']:,} of them before" if result["n_before"] else ""
    return {
        "heads": f"{result['n_heads']:,} heads{before}",
        "requests": f"{result['requests']:,} requests, with passages of the analysed text",
        "to": f"{result['model']} at {result['endpoint']}, {key}",
        "tokens": f"about {result['tokens_in']:,} tokens sent and {result['tokens_out']:,} received"
        + _cost(result),
    }


def _cost(result: dict[str, Any]) -> str:
    return "" if (cost := result["cost_usd"]) is None else f", {cost:,.4f} USD"


def explain_table(result: dict[str, Any]) -> Table | Group:
    """Show what was said of the first heads and what it took, or what it would take."""
    if not result["sent"]:
        rows = estimate_rows(result)
        return fact_table(
            "explanations would take", rows | {"sent": "nothing; the same command with --yes sends"}
        )
    table = Table(title="explained", title_justify="left", box=SIMPLE_HEAD)
    for name in ("head", "score", "contexts"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("explanation", overflow="fold")
    for row in result["first"]:
        score = "-" if row["score"] is None else f"{row['score']:.2f}"
        table.add_row(str(row["head"]), score, str(row["n_scored"] or "-"), escape(row["text"]))
    for row in result["failed"]:
        table.add_row(str(row["head"]), "-", "-", f"[red]failed: {escape(row['error'])}[/]")
    mean = "-" if result["mean_score"] is None else f"{result['mean_score']:.2f}"
    heads = f"{result['n_explained']:,} of {result['n_heads']:,} explained"
    sums = {
        "heads": f"{heads}, {result['n_failed']:,} failed",
        "mean score": f"{mean} of {result['n_scored']:,}; 0.5 is a guess, 1 is perfect",
        "requests": f"{result['requests']:,}, {result['tokens_in']:,} tokens sent and "
        f"{result['tokens_out']:,} received{_cost(result)}",
        "file": result["file"],
    }
    return Group(table, fact_table("in all", sums))


def spell_time(seconds: float) -> str:
    """Return a time in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
