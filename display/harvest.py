"""Progress and results of a harvest."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table

from ..sites import Site, spell_site_names
from ..store.care.info import format_bytes
from ..store.layers import spell_layers
from ..store.spelling import spell_sites
from .bars import Bar, err, say
from .words import fact_table, model_name, spell_time

if TYPE_CHECKING:
    from ..harvest.config import HarvestConfig
    from ..harvest.events import HarvestEvent
    from ..language.blockcheck import BlockChecks
    from ..language.selfcheck import SelfCheck


class HarvestDisplay(Bar):
    """Shows the events of a harvest."""

    def __init__(self, *, shows_plan: bool = True) -> None:
        super().__init__("harvest")
        self._shows_plan = shows_plan

    def __call__(self, event: "HarvestEvent") -> None:
        """Show an event."""
        from ..harvest.events import Progress
        from ..harvest.plan import Estimate, Plan
        from ..language.blockcheck import BlockChecks
        from ..language.selfcheck import SelfCheck

        match event:
            case str():
                say(event)
            case Plan() if self._shows_plan:
                table = Table.grid("", Column(overflow="fold"), padding=(0, 2))
                for name, value in _plan_rows(asdict(event)).items():
                    table.add_row(f"  {name}", escape(value))
                err.print(table)
            case SelfCheck():
                self._self_check(event)
            case BlockChecks():
                self._block_checks(event)
            case Estimate():
                self.expect(event.seconds)
                say(
                    f"about {spell_time(event.seconds)}: {event.tokens_per_second:,.0f} tokens/s, "
                    f"{event.batch_seqs} sequences in a forward pass"
                )
            case Progress():
                note = f"{event.tokens_per_second:,.0f} tokens/s"
                self.update(event.tokens, event.n_tokens, note)

    def taken_over(self, asked: "HarvestConfig", settings: "HarvestConfig") -> None:
        """Say which settings are the store's because they were not given."""
        changed = {
            field.name: getattr(settings, field.name)
            for field in fields(settings)
            if getattr(settings, field.name) != getattr(asked, field.name)
        }
        if changed:
            words = ", ".join(f"{name} {value}" for name, value in changed.items())
            say(f"not given, and so as {settings.store} has it: {words}")

    def _self_check(self, check: "SelfCheck") -> None:
        errors = [found.error for found in check.layers.values() if found.passed]
        if errors:
            limit = f"limit {check.limit:.0e}"
            say(f"self-check: attn_out recomputed from attn_in within {max(errors):.1e} ({limit})")
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

    def _block_checks(self, checks: "BlockChecks") -> None:
        """Say how well MLPs and residual streams are understood, and which are not."""
        limit = f"limit {checks.limit:.0e}"
        parts = (
            ("mlp_out recomputed from mlp_in", checks.mlps),
            ("resid_out summed", checks.blocks),
        )
        for what, found in parts:
            if errors := [check.error for check in found.values() if check.passed]:
                say(f"self-check: {what} within {max(errors):.1e} ({limit})")
        unknown: dict[str | None, list[int]] = {}
        for layer, check in checks.mlps.items():
            if not check.passed:
                unknown.setdefault(check.reason, []).append(layer)
        for reason, layers in unknown.items():
            say(
                f"self-check: layers {spell_layers(layers)}: geometry of the MLP unknown ({reason})"
            )


def _plan_rows(plan: dict[str, Any]) -> dict[str, str]:
    free = "" if plan["free_bytes"] is None else f" of {format_bytes(plan['free_bytes'])} free"
    names = list(plan["layers"].values())
    shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
    rows = {
        "model": f"{model_name(plan['model'])} on {plan['device']}",
        "layers": f"{spell_layers(list(plan['layers']))} ({shown})",
        **_sites_row(plan["sites"]),
        "tokens": f"{plan['n_tokens']:,} in sequences of {plan['n_ctx']:,}"
        + ("" if plan["n_documents"] is None else f", documents: {plan['n_documents']:,}"),
        "per token": f"{plan['bytes_per_token']:,} bytes of activations",
        "store": format_bytes(plan["total_bytes"]) + free,
    }
    if plan["first_tokens"]:
        rows["begins"] = plan["first_tokens"]
    if plan["warning"]:
        rows["warning"] = plan["warning"]
    return rows


def _sites_row(sites: Sequence[str], spelled: str | None = None) -> dict[str, str]:
    """Return a row for sites such as 12.mlp_in, by name alone or as spelled; none for `attn`."""
    names = spell_site_names({site.partition(".")[2] for site in sites})
    return {} if names == "attn" else {"sites": spelled or names}


def plan_table(result: dict[str, Any]) -> Table:
    """Return what a harvest would write."""
    rows = _plan_rows(result)
    if (estimate := result["estimate"]) is not None:
        rate = f"{estimate['tokens_per_second']:,.0f} tokens/s"
        rows["time"] = f"about {spell_time(estimate['seconds'])}, {rate}"
    return fact_table("a harvest would write", rows)


def harvest_table(result: dict[str, Any]) -> Table:
    """Return what a harvest wrote."""
    rows = {
        "model": model_name(result["model"]),
        "layers": spell_layers(result["layers"]),
        **_sites_row(result["sites"], spell_sites(map(Site.parse, result["sites"]))),
        "tokens": f"{result['n_tokens']:,} in {result['n_seq']:,} sequences",
        "size": format_bytes(result["n_bytes"]),
        "time": spell_time(result["seconds"])
        + (f", {rate:,.0f} tokens/s" if (rate := result["tokens_per_second"]) else ""),
        "store": result["store"],
    }
    if bad := result["nonfinite_layers"]:
        rows["NaN or Inf"] = f"layers {spell_layers(bad)}, which cannot be trained on"
    return fact_table("harvested", rows)
