"""Results of the demo."""

from typing import Any

from rich.table import Table

from ..store.care.info import format_bytes
from .evaluate import quality_rows
from .words import fact_table, spell_time


def demo_table(result: dict[str, Any]) -> Table:
    """Return what the demo measured."""
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
