"""Results of a conversion."""

from typing import Any

from rich.table import Table

from .words import fact_table


def convert_table(result: dict[str, Any]) -> Table:
    """Return what a conversion made."""
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
