"""Results of conversions, uploads and the demo."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from ..store.care.info import format_bytes
from ..store.layers import spell_layers
from .evaluate import quality_rows
from .words import fact_table, spell_time


def push_lines(result: dict[str, Any]) -> str:
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
