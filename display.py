"""What people see: progress on stderr, results on stdout."""

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from .store import format_bytes, spell_layers
from .tables import (
    ablate_tables,
    analyze_table,
    estimate_rows,
    eval_tables,
    explain_table,
    fact_table,
    find_table,
    number,
    quality_rows,
    spell_time,
)

if TYPE_CHECKING:  # each command loads its own stage alone
    from . import analyze as stage3
    from . import harvest as stage1
    from . import train as stage2
    from .store import Checked

PLAIN_EVERY_S = 15.0
"""Seconds between lines of progress where stderr is no terminal."""

err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Tell what is being done."""
    err.print(f"[dim]·[/] {escape(text)}", soft_wrap=True)


class _Bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        self._task: Any = None
        self._said_at = 0.0
        self._said = (-1, -1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.disable:  # rich 13 prints a blank line for one that is disabled
            self._progress.stop()

    def update(self, done: int, total: int, note: str, left_s: float | None = None) -> None:
        """Show how far it is; on a terminal the bar knows the time left by itself."""
        if self._task is None:
            self._task = self._progress.add_task(self._label, total=total, note="")
        self._progress.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        ends = done == total and self._said != (done, total)
        if not err.is_terminal and (now - self._said_at > PLAIN_EVERY_S or ends):
            self._said_at, self._said = now, (done, total)
            left = "" if left_s is None else f"  {spell_time(left_s)} left"
            say(f"{self._label} {done:,} of {total:,}  {note}{left}")


class HarvestDisplay(_Bar):
    """Shows the events of a harvest."""

    def __init__(self, *, shows_plan: bool = True) -> None:
        super().__init__("harvest")
        self._shows_plan = shows_plan

    def __call__(
        self,
        event: "str | stage1.Plan | stage1.SelfCheck | stage1.Estimate | stage1.Progress",
    ) -> None:
        """Show an event."""
        from .harvest import Estimate, Plan, Progress, SelfCheck

        match event:
            case str():
                say(event)
            case Plan() if self._shows_plan:
                self._plan(event)
            case SelfCheck():
                self._self_check(event)
            case Estimate():
                self._estimate(event)
            case Progress():
                self.update(
                    event.tokens, event.n_tokens, f"{event.tokens_per_second:,.0f} tokens/s"
                )

    def taken_over(self, asked: "stage1.HarvestConfig", settings: "stage1.HarvestConfig") -> None:
        """Say which settings are the store's because they were not given."""
        changed = {
            field.name: getattr(settings, field.name)
            for field in fields(settings)
            if getattr(settings, field.name) != getattr(asked, field.name)
        }
        if changed:
            words = ", ".join(f"{name} {value}" for name, value in changed.items())
            say(f"not given, and so as {settings.store} has it: {words}")

    def _estimate(self, estimate: "stage1.Estimate") -> None:
        say(
            f"about {spell_time(estimate.seconds)}: {estimate.tokens_per_second:,.0f} tokens/s, "
            f"{estimate.batch_seqs} sequences in a forward pass"
        )

    def _self_check(self, check: "stage1.SelfCheck") -> None:
        errors = [found.error for found in check.layers.values() if found.passed]
        if errors:
            limit = f"limit {check.limit:.0e}"
            say(f"self-check: y recomputed from x within {max(errors):.1e} ({limit})")
        unknown: dict[str | None, list[int]] = {}
        for layer, found in check.layers.items():
            if found.finite and not found.passed:
                unknown.setdefault(found.reason, []).append(layer)
        for reason, layers in unknown.items():
            say(
                f"self-check: layers {spell_layers(layers)}: geometry unknown ({reason}); they can "
                "be trained from --init random"
            )
        if bad := [layer for layer, found in check.layers.items() if not found.finite]:
            say(f"self-check: layers {spell_layers(bad)} have NaN or Inf and were not checked")

    def _plan(self, plan: "stage1.Plan") -> None:
        table = Table.grid("", Column(overflow="fold"), padding=(0, 2))
        for name, value in _plan_rows(plan).items():
            table.add_row(f"  {name}", escape(value))
        err.print(table)


def _plan_rows(plan: "stage1.Plan") -> dict[str, str]:
    free = "" if plan.free_bytes is None else f" of {format_bytes(plan.free_bytes)} free"
    names = list(plan.layers.values())
    shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
    rows = {
        "model": f"{plan.model} on {plan.device}",
        "layers": f"{spell_layers(list(plan.layers))} ({shown})",
        "tokens": f"{plan.n_tokens:,} in sequences of {plan.n_ctx:,}"
        + ("" if plan.n_documents is None else f", documents: {plan.n_documents:,}"),
        "per token": f"{plan.bytes_per_token:,} bytes of activations",
        "store": format_bytes(plan.total_bytes) + free,
    }
    if plan.first_tokens:
        rows["begins"] = plan.first_tokens
    return rows


class TrainDisplay(_Bar):
    """Shows the events of a training run."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"layer {layer}")
        self._fvu = "-"

    def __call__(self, event: "stage2.Event") -> None:
        """Show an event."""
        from .train import Look, StepReport

        match event:
            case str():
                say(event)
            case Look():
                self._fvu = f"{event.held_out.fvu:.3f}"
                say(f"{self._label}: {look_line(event)}")
            case StepReport():
                note = (
                    f"{event.tokens_per_second:,.0f} tok/s  FVU {self._fvu}  "
                    f"dead {event.dead_fraction:.1%}  data wait {event.data_wait_fraction:.0%}"
                )
                left = (event.train_tokens - event.tokens) / max(event.tokens_per_second, 1e-9)
                self.update(event.tokens, event.train_tokens, note, left)


def look_line(look: "stage2.Look") -> str:
    """Return in words what a look found."""
    found = look.held_out
    masked = ""
    if found.masked_fraction:
        masked = f" ({found.fvu_all:.4f} with the {found.masked_fraction:.1%} that do not count)"
    return (
        f"FVU {found.fvu:.4f}{masked} on {found.n_tokens:,} held-out tokens, after {look.tokens:,}"
    )


class CareDisplay(_Bar):
    """Shows how far a store is read or written."""

    def __call__(self, event: "Checked") -> None:
        """Show an event."""
        if event.total_bytes:
            note = f"{format_bytes(event.n_bytes)} of {format_bytes(event.total_bytes)}"
            self.update(event.n_bytes, event.total_bytes, note)


class AnalyzeDisplay(_Bar):
    """Shows how far an evaluation or an analysis is."""

    def __call__(self, event: "str | stage3.Measured") -> None:
        """Show an event."""
        if isinstance(event, str):
            say(event)
            return
        note, left = event.what, None
        if event.tokens_per_second is not None:
            note += f"  {event.tokens_per_second:,.0f} tokens/s"
            left = (event.total - event.done) / max(event.tokens_per_second, 1e-9)
        self.update(event.done, event.total, note, left)


class ExplainDisplay(_Bar):
    """Shows how far the heads are explained."""

    def __init__(self) -> None:
        super().__init__("explain")

    def __call__(self, event: "str | stage3.Estimate | stage3.Said") -> None:
        """Show an event."""
        from .analyze import Estimate, Said

        match event:
            case str():
                say(event)
            case Estimate():
                say(", ".join(estimate_rows(asdict(event)).values()))
            case Said():
                note = f"head {event.head}: {event.words}"
                self.update(event.n_done, event.n_heads, escape(note[:60]))


class PageDisplay(_Bar):
    """Shows how far a page is written."""

    def __call__(self, done: int, total: int) -> None:
        """Show the number of heads written."""
        self.update(done, total, "heads")


def show(command: str, result: dict[str, Any]) -> None:
    """Print a command's result on stdout."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 200  # a file has no edge
    content = _TABLES[command](result)
    out.print(content, soft_wrap=isinstance(content, str))
    if result.get("next"):  # to be copied, so in one line
        out.print(f"next: {escape(result['next'])}", soft_wrap=True)


def _plan_table(result: dict[str, Any]) -> Table:
    from .harvest import Estimate, Plan

    found = result["estimate"]
    plan = Plan(**{**result, "estimate": None if found is None else Estimate(**found)})
    rows = _plan_rows(plan)
    if plan.estimate is not None:
        rate = f"{plan.estimate.tokens_per_second:,.0f} tokens/s"
        rows["time"] = f"about {spell_time(plan.estimate.seconds)}, {rate}"
    return fact_table("a harvest would write", rows)


def _harvest_table(result: dict[str, Any]) -> Table:
    rows = {
        "model": result["model"],
        "layers": spell_layers(result["layers"]),
        "tokens": f"{result['n_tokens']:,} in {result['n_seq']:,} sequences",
        "size": format_bytes(result["n_bytes"]),
        "time": spell_time(result["seconds"])
        + (f", {rate:,.0f} tokens/s" if (rate := result["tokens_per_second"]) else ""),
        "store": result["store"],
    }
    bad = result["nonfinite_layers"]
    good = [layer for layer in result["layers"] if layer not in bad]
    if bad:
        rows["NaN or Inf"] = f"layers {spell_layers(bad)}, which cannot be trained on"
    if good:
        words = ["lorsa", "train", "--store", result["store"]]
        rows["next"] = shlex.join(words + (["--layers", spell_layers(good)] if bad else []))
    return fact_table("harvested", rows)


def _train_table(result: dict[str, Any]) -> Table:
    runs = result["runs"]
    table = Table(title="trained", title_justify="left", box=SIMPLE_HEAD)
    for name in ("layer", "FVU", "L0", "dead", "tokens", "tokens/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("run", overflow="fold")
    for run in runs:
        table.add_row(
            str(run["layer"]),
            number(run["fvu"]),
            f"{run['l0']:.1f}",
            f"{run['dead_fraction']:.1%}",
            f"{run['train_tokens']:,}",
            f"{run['tokens_per_second']:,.0f}",
            spell_time(run["seconds"]),
            escape(run["run"]),
        )
    for run in result["failed"]:
        table.add_row(str(run["layer"]), *"------", f"[red]failed: {escape(run['error'])}[/]")
    windows = {f"{run['dead_window_tokens']:,}" for run in runs} or {"-"}
    table.caption = f"dead: did not fire on the last {' or '.join(sorted(windows))} tokens"
    table.caption_justify = "left"
    return table


def _sweep_table(result: dict[str, Any]) -> Table:
    """Show the rows of a sweep: the settings that differ, then what came out, the best in bold."""
    rows = result["rows"]
    table = Table(title="swept", title_justify="left", box=SIMPLE_HEAD)
    names = list(dict.fromkeys(name for row in rows for name in row))
    settings = names[: names.index("fvu")] if "fvu" in names else names
    for name in (*settings, "FVU", "L0", "dead", "tokens/s"):
        table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("run", overflow="fold")
    fvus = [row["fvu"] for row in rows if row.get("fvu") is not None]
    for row in rows:
        values = [escape(_setting(row.get(name))) for name in settings]
        if row.get("error"):
            failed = f"[red]failed: {escape(row['error'])}[/]"
            table.add_row(*values, "-", "-", "-", "-", failed)
            continue
        best = row["fvu"] is not None and row["fvu"] == min(fvus)
        table.add_row(
            *values,
            number(row["fvu"]),
            f"{row['l0']:.1f}",
            f"{row['dead_fraction']:.1%}",
            f"{row['tokens_per_second']:,.0f}",
            escape(row["run"]),
            style="bold" if best else None,
        )
    size = format_bytes(result["bytes_read"])
    table.caption = escape(f"sweep.csv and pareto.png in {result['out']}; {size} read")
    table.caption_justify = "left"
    return table


def _setting(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _view_table(result: dict[str, Any]) -> Table:
    rows = {
        "page": result["file"],
        "heads": f"{result['n_heads']:,}",
        "size": f"{format_bytes(result['n_bytes'])} in {result['n_files']:,} files",
    }
    if result["url"]:
        rows["at"] = f"{result['url']}  (Ctrl-C ends it)"
    if result["opened"] is False:
        rows["browser"] = "none found here; open the page by hand"
    return fact_table("a page of heads", rows)


def _info_table(result: dict[str, Any]) -> Table:
    complete = "complete"
    if not result["complete"]:
        complete = f"{result['n_missing_shards']:,} of {result['n_shards']:,} shards are missing"
    rows = {
        "model": result["model"] + (f" @ {result['revision']}" if result["revision"] else ""),
        "corpus": f"{result['corpus']}, {result['n_documents']:,} documents",
        "tokens": f"{result['n_tokens']:,} in {result['n_seq']:,} sequences of {result['n_ctx']:,}",
        "held out": f"{result['n_held_out_tokens']:,} tokens",
        "stored as": f"{result['dtype']}, compression {result['compression']}",
        "size": f"{format_bytes(result['n_bytes'])} in {result['n_shards']:,} shards",
        "uuid": result["uuid"],
        "created": f"{result['created']}, {complete}",
    }
    if result["adding"]:
        rows["being added"] = f"layers {spell_layers(result['adding'])}"
    for layer, facts in result["layers"].items():
        rows[f"layer {layer}"] = _layer_row(facts)
    return fact_table(result["store"], rows)


def _layer_row(facts: dict[str, Any]) -> str:
    parts = [format_bytes(facts["n_bytes"])]
    if "heads" in facts:
        parts += [f"heads {facts['heads']}", f"kv heads {facts['kv_heads']}"]
    norms = f"{facts['mean_norm_x']:.3g} in, {facts['mean_norm_y']:.3g} out"
    parts.append(f"mean norms {norms}")
    if facts["self_check"] is not None:
        parts.append(f"self-check {'passed' if facts['self_check']['passed'] else 'failed'}")
    if facts["n_nonfinite"]:
        parts.append(f"{facts['n_nonfinite']:,} tokens with NaN or Inf")
    for name, scales in facts["int8_scales"].items():
        parts.append(f"{name} scales {scales['mean']:.3g}, largest {scales['largest']:.3g}")
    return ", ".join(parts)


_FIXES = {
    "harvest": "its shard can be written again",
    "rewrite": "can be written anew",
    "none": "cannot be made again: restore a copy, or delete the store and harvest again",
}


def _verify_lines(result: dict[str, Any]) -> str:
    """Return a line for each thing that is wrong, and what to type."""
    lines = [f"{d['path']} {d['problem']}; {_FIXES[d['fix']]}" for d in result["damages"]]
    how = "every checksum" if result["full"] else "presence, sizes, metadata"
    size = f"{result['n_files']:,} files, {format_bytes(result['n_bytes'])}; {how}"
    if result["dropped_shards"]:
        lines.append(f"dropped shards {', '.join(map(str, result['dropped_shards']))}")
    for folder in result["leftovers"]:
        layer = folder.split("/")[1]
        lines.append(
            f"{folder} is no longer in the store: lorsa store rm --layers {layer} frees it"
        )
    if result["complete"] and (not result["damages"] or result["repaired"]):
        lines.append(f"{result['store']} is whole ({size})")
    elif result["complete"]:
        lines.append(f"{result['store']} is damaged ({size})")
    else:
        missing = f"{result['n_missing_shards']:,} of {result['n_shards']:,} shards are missing"
        lines.append(f"{result['store']} is unfinished: {missing} ({size})")
    return escape("\n".join(lines))


def _rm_table(result: dict[str, Any]) -> Table:
    rows = {
        "layers": spell_layers(result["removed"]),
        "freed": format_bytes(result["n_bytes"]),
        "remaining": spell_layers(result["layers"]),
    }
    return fact_table(f"removed from {result['store']}", rows)


def _merge_table(result: dict[str, Any]) -> Table:
    rows = {
        "stores": ", ".join(result["merged"]),
        "layers": spell_layers(result["layers"]),
        "tokens": f"{result['n_tokens']:,} in {result['n_seq']:,} sequences",
        "held out": f"{result['n_held_out_tokens']:,} tokens",
        "size": format_bytes(result["n_bytes"]),
        "store": result["store"],
    }
    return fact_table("merged", rows)


def _push_lines(result: dict[str, Any]) -> str:
    """Return what was pushed; of a dry run the card and the files, as they would be."""
    files = [f"{format_bytes(size):>10}  {path}" for path, size in result["files"].items()]
    where = result["url"] or result["repo"]
    if not result["sent"]:
        told = ["", f"nothing was sent; {where} would get", *files]
        return escape("\n".join([result["card"], *told]))
    told = [f"{'written' if result['url'] is None else 'pushed'} to {where}", *files]
    if result["commit"] is not None:
        told.append(f"in commit {result['commit']}")
    others = [layer for layer in result["layers"] if layer not in result["pushed"]]
    if others:
        told.append(f"beside layers {spell_layers(others)}, which were there")
    return escape("\n".join(told))


def _demo_table(result: dict[str, Any]) -> Table:
    harvested, trained, measured = result["harvest"], result["train"], result["eval"]
    rows = {
        "model": f"SmolLM2-135M-Instruct (4 bit), layer {measured['layer']}",
        "trained on": f"{trained['train_tokens']:,} tokens",
        "speed": f"{trained['tokens_per_second']:,.0f} tokens/s",
        "heads": f"{trained['n_ov_heads']:,}, {trained['top_k']} fire per token",
        "dead heads": f"{trained['dead_fraction']:.1%} did not fire on the last "
        f"{trained['dead_window_tokens']:,} tokens of training",
        **quality_rows(measured),
        "store": f"{harvested['store']} ({format_bytes(harvested['n_bytes'])})",
        "run": trained["run"],
        "time": spell_time(result["seconds"]),
    }
    return fact_table("a Lorsa of SmolLM2-135M-Instruct", rows)


def _convert_table(result: dict[str, Any]) -> Table:
    rows = {
        "of": f"layer {result['layer']} of {result['base_model'] or 'a model that is not named'}",
        "heads": f"{result['n_ov_heads']:,} OV, {result['n_qk_heads']} QK",
        "fires": f"{result['activation']}, top_k {result['top_k']}",
        "reads": "x, the layer's input" if result["hook_in"] == "x" else result["hook_in"],
        "format": result["to"],
        "folder": result["out"],
    }
    rows |= {f"note {i}" if i else "note": note for i, note in enumerate(result["notes"])}
    return fact_table("converted", rows)


_TABLES: dict[str, Callable[[dict[str, Any]], RenderableType]] = {
    "harvest": _harvest_table,
    "plan": _plan_table,
    "train": _train_table,
    "sweep": _sweep_table,
    "eval": eval_tables,
    "ablate": ablate_tables,
    "analyze": analyze_table,
    "find": find_table,
    "explain": explain_table,
    "view": _view_table,
    "convert": _convert_table,
    "info": _info_table,
    "verify": _verify_lines,
    "rm": _rm_table,
    "merge": _merge_table,
    "push": _push_lines,
    "demo": _demo_table,
}
