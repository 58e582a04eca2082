"""Results of a conversion."""

from typing import Any

from rich.table import Table

from .words import NOUNS, fact_table, things_of

X = {True: "x, the layer's input", False: "x, its site of the model"}
"""What is read, of a Lorsa and of other kinds."""


def convert_table(result: dict[str, Any]) -> Table:
    """Return what a conversion made."""
    is_lorsa = result["kind"] == "lorsa"
    what = "layer" if is_lorsa else f"{NOUNS[result['kind']]} at layer"
    rows = {
        "of": f"{what} {result['layer']} of {result['base_model'] or 'a model that is not named'}",
        things_of(result["kind"]): f"{result['n_ov_heads']:,} OV, {result['n_qk_heads']} QK"
        if is_lorsa
        else f"{result['n_features']:,}",
        "fires": f"{result['activation']}, top_k {result['top_k']}",
        "reads": X[is_lorsa] if result["hook_in"] == "x" else result["hook_in"],
        "format": result["to"],
        "folder": result["out"],
    }
    rows |= {f"note {i}" if i else "note": note for i, note in enumerate(result["notes"])}
    return fact_table("converted", rows)
