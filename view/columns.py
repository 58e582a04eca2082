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
from ..analyze.said import beyond_chance, said
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
    promoted = _said(heads, "promoted")
    columns["promotes"] = [
        None if rows is None else [row["token"] for row in rows[:N_NAMED]] for rows in promoted
    ]
    columns["promotes_z"] = rounded(heads["promoted_list_z"].to_pylist())
    return columns


def _said(heads: pa.Table, name: str) -> list[list[dict[str, Any]] | None]:
    """Return what may be said of each head; see `said`."""
    columns = [column for column in heads.column_names if column.startswith(name)]
    return [said(row, name) for row in heads.select(columns).to_pylist()]


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
            z, beyond = known.get(f"{name}_z"), beyond_chance(row, name)
            found[name] = [
                [pair[key] for pair in pairs],
                rounded(pair[value] for pair in pairs),
                None if z is None else rounded(z),
                beyond,
            ]
    return found


def named_tokens(contexts: list[dict[str, Any]]) -> list[int]:
    """Return the tokens on which a head fires most often in its top examples."""
    return [token for token, _ in Counter(c["token"] for c in contexts).most_common(N_NAMED)]


def searched(
    heads: pa.Table, firing: list[list[int]], explanations: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Return what the search looks through: tokens, each with how strong a claim it is.

    Args:
        heads: rows of heads.parquet.
        firing: the tokens of each head's top examples.
        explanations: by head, as of `Analysis.explanations`.

    Returns:
        For each relation `counts`, [n_heads], and `tokens` and `strengths`, one head's after the
        other's: the share of its top examples, of its reading, or a z. And `explained`, the
        head, text and score of each explanation.
    """
    relations = {
        "fires": [_shares(tokens) for tokens in firing],
        "reads": _strengths(heads, "reads", "share"),
        "embedding": _strengths(heads, "reads_embedding", "z"),
        "promotes": _strengths(heads, "promoted", "z"),
    }
    explained = [[head, each["text"], each["score"]] for head, each in explanations.items()]
    return {**{name: _flat(found) for name, found in relations.items()}, "explained": explained}


def _shares(tokens: list[int]) -> dict[int, float]:
    return {token: n / len(tokens) for token, n in sorted(Counter(tokens).items())}


def _strengths(heads: pa.Table, name: str, strength: str) -> list[dict[int, float]]:
    return [{row["token"]: row[strength] for row in rows or []} for rows in _said(heads, name)]


def _flat(found: list[dict[int, float]]) -> dict[str, list[Any]]:
    return {
        "counts": [len(row) for row in found],
        "tokens": [token for row in found for token in row],
        "strengths": rounded(strength for row in found for strength in row.values()),
    }
