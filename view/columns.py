"""The page's data of each head, made from heads.parquet.

The index has a list for every number of a head, and is loaded at once. The rest of a head is loaded
with its contexts when it is opened.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from ..analyze.choices import LOWER
from ..analyze.schema import HEADS

DIGITS = 4
"""Significant digits of the numbers on a page."""
N_NAMED = 3
"""Tokens that the table shows of a head."""

_NUMBERS = [
    field.name
    for field in HEADS
    if pa.types.is_primitive(field.type) and field.name not in ("head", *LOWER.values())
]
_LISTS = ("act_quantiles", "by_distance")
_PARENT = ("head", "ov", "qk", "pattern")
_PAIRS = {
    "promoted": ("token", "logit"),
    "suppressed": ("token", "logit"),
    "reads_embedding": ("token", "value"),
    "reads": ("token", "share"),
    "similar_o": ("head", "cosine"),
    "similar_v": ("head", "cosine"),
}


def rounded(values: Iterable[float | None]) -> list[float | int | None]:
    """Return numbers with few digits; None in place of None, NaN and infinity."""
    return [_rounded(value) for value in values]


def _rounded(value: float | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() else short


def index_columns(heads: pa.Table) -> dict[str, list[Any]]:
    """Return the index: a list per number, [n_heads] each, None where it is unknown."""
    columns: dict[str, list[Any]] = {"type": heads["type"].to_pylist()}
    for name in _NUMBERS:
        whole = pa.types.is_integer(HEADS.field(name).type)
        values = heads[name].to_pylist()
        columns[name] = values if whole else rounded(values)
    likeliest = [parents[0] if parents else {} for parents in heads["parents"].to_pylist()]
    columns["parent"] = [parent.get("head") for parent in likeliest]
    for name in _PARENT[1:]:
        columns[f"parent_{name}"] = rounded(parent.get(name) for parent in likeliest)
    promoted = heads["promoted"].to_pylist()
    columns["promotes"] = [
        None if rows is None else [row["token"] for row in rows[:N_NAMED]] for rows in promoted
    ]
    return columns


def details(heads: pa.Table) -> list[dict[str, Any]]:
    """Return the rest of each head, which is neither in the index nor in its contexts."""
    return [_detail(row) for row in heads.to_pylist()]


def _detail(row: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in row.items() if value is not None}
    found: dict[str, Any] = dict.fromkeys((*_LISTS, "parents", *_PAIRS))
    found["low"] = {name: _rounded(known[low]) for name, low in LOWER.items() if low in known}
    found |= {name: rounded(known[name]) for name in _LISTS if name in known}
    if "parents" in known:
        found["parents"] = {key: rounded(p[key] for p in known["parents"]) for key in _PARENT}
    for name, (key, value) in _PAIRS.items():
        if (pairs := known.get(name)) is not None:
            found[name] = [[pair[key] for pair in pairs], rounded(pair[value] for pair in pairs)]
    return found


def named_tokens(contexts: list[dict[str, Any]]) -> list[int]:
    """Return the tokens on which a head fires most often in its top examples."""
    return [token for token, _ in Counter(c["token"] for c in contexts).most_common(N_NAMED)]


def searched_tokens(heads: pa.Table, firing: list[list[int]]) -> dict[str, dict[str, list[int]]]:
    """Return which tokens each head fires on, promotes and reads, for the search by token.

    Args:
        heads: rows of heads.parquet.
        firing: the tokens of each head's top examples.

    Returns:
        For each relation `counts`, [n_heads], and `tokens`, one head's after the other's.
    """
    promoted, reads, embeddings = (
        [[pair["token"] for pair in rows or []] for rows in heads[name].to_pylist()]
        for name in ("promoted", "reads", "reads_embedding")
    )
    read = [[*a, *b] for a, b in zip(reads, embeddings, strict=True)]
    return {
        name: _flat([sorted(set(tokens)) for tokens in lists])
        for name, lists in {"fires": firing, "promotes": promoted, "reads": read}.items()
    }


def _flat(lists: list[list[int]]) -> dict[str, list[int]]:
    return {"counts": [len(row) for row in lists], "tokens": [x for row in lists for x in row]}
