"""Numbers, times and facts as every table of results spells them."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from ..printable import printable
from .listing import Listing

NOUNS = {"lorsa": "Lorsa", "sae": "SAE", "transcoder": "transcoder"}
"""Kinds of dictionaries in a sentence."""


def things_of(kind: str) -> str:
    """Return what the features of a kind of dictionary are called."""
    return "heads" if kind == "lorsa" else "features"


def place_of(result: dict[str, Any]) -> str:
    """Return what a dictionary is of: layer 12 of a Lorsa, else its kind and what it writes."""
    if result["kind"] == "lorsa":
        return f"layer {result['layer']}"
    return f"{NOUNS[result['kind']]} of {', '.join(result['writes'])}"


def fact_table(title: str, rows: dict[str, str]) -> Table:
    """Return a table of names and values, each value in a line."""
    table = Table(
        "",
        Column(overflow="fold"),
        title=escape(printable(title)),
        title_justify="left",
        show_header=False,
        box=SIMPLE_HEAD,
    )
    for name, value in rows.items():
        table.add_row(escape(printable(name)), escape(printable(value)))
    return table


def list_table(title: str, *columns: Column) -> Table:
    """Return a table of such columns without rows yet, its caption at the left."""
    table = Listing(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)
    table.caption_justify = "left"
    return table


def numbers(*names: str) -> list[Column]:
    """Return columns of numbers, which are always seen whole."""
    return [Column(name, justify="right", no_wrap=True) for name in names]


def words(name: str) -> Column:
    """Return a column of text, which takes several lines where it must."""
    return Column(name, overflow="fold")


def number(value: float | None) -> str:
    """Spell a measure of y."""
    return "undefined: y does not vary" if value is None else f"{value:.4f}"


def short(value: float | None, form: str = ".4f") -> str:
    """Spell a number in some form, or - for none."""
    return "-" if value is None else format(value, form)


def share(value: float | None) -> str:
    """Spell a share of the loss that ablation costs."""
    return "undefined (ablation costs nothing)" if value is None else f"{value:.1%}"


def model_name(model: str) -> str:
    """Return the name of a language model: the last part of a path, an id of the Hub whole."""
    is_path = model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") > 1
    return model.rstrip("/").rpartition("/")[2] if is_path else model


def spell_time(seconds: float) -> str:
    """Return a time in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
