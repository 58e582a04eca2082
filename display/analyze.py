"""Results of an analysis."""

from typing import Any

from rich.table import Table

from ..analyze.type_names import spelled
from .words import fact_table, spell_time


def analyze_table(result: dict[str, Any]) -> Table:
    """Show how many heads are of each type."""
    n_fired = result["n_ov_heads"] - result["types"].get("silent", 0)
    rows = {
        "heads": f"{result['n_ov_heads']:,}, of which {n_fired:,} fired on {result['n_tokens']:,} "
        "tokens",
        **{spelled(name): f"{count:,}" for name, count in result["types"].items()},
        "time": spell_time(result["seconds"]),
        "analysis": result["analysis"],
    }
    if not result["with_model"]:
        rows["not done"] = "effects on logits, probes: give --model"
    return fact_table(f"heads of layer {result['layer']} of {result['run']}", rows)
