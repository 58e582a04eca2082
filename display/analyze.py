"""Results of an analysis."""

from typing import Any

from rich.table import Table

from ..analyze.choices import STORE_SCORES
from ..analyze.type_names import spelled
from .words import fact_table, spell_time


def analyze_table(result: dict[str, Any]) -> Table:
    """Show how many heads are of each type."""
    n_fired = result["n_ov_heads"] - result["types"].get("silent", 0)
    rows = {
        "heads": f"{result['n_ov_heads']:,}, of which {n_fired:,} fired on {result['n_tokens']:,} "
        "tokens",
        **{spelled(name): _count(name, result) for name in result["types"]},
        "time": spell_time(result["seconds"]),
        "analysis": result["analysis"],
    }
    if not result["with_model"]:
        rows["not done"] = "effects on logits, probes: give --model"
    if families := [name for name, found in result["families"].items() if found["verified"]]:
        rows["verified"] = ", ".join(_verified(name, result["families"][name]) for name in families)
    return fact_table(f"heads of layer {result['layer']} of {result['run']}", rows)


def _count(name: str, result: dict[str, Any]) -> str:
    """Spell how many heads are of a type, and of how many of them probes say the same."""
    count, both = result["types"][name], result["types_by_both"].get(name, 0)
    told = result["with_model"] and name in STORE_SCORES
    return f"{count:,}, of {both:,} probes say the same" if told else f"{count:,}"


def _verified(name: str, family: dict[str, Any]) -> str:
    """Spell what the model loses without a family."""
    return f"{spelled(name)} (copying costs {family['effect']:+.2f} nats without them)"
