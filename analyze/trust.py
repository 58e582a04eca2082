"""Trust in the types of heads: the smaller of what text and probes say, by lower bounds.

    trusted = min(bound of the share in text, bound of the share on probes)

A bound is a column `KIND_low` of heads.parquet. Analyses of version 1 have none: there it is the
share itself, of heads that fired often enough, and no head is known to be a successor.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..store.parquet import numbers
from .choices import KINDS, LABEL_FROM, LEAST_FIRED, LOWER, N_SINGLE, STORE_SCORES
from .result import Analysis

Scores = NDArray[np.float64]
N_STARTS = 3
"""Heads of a kind that a page names."""


def bound(analysis: Analysis, score: str) -> Scores:
    """Return the lower bound of a score, NaN where nothing can be told, [n_heads].

    Args:
        analysis: whose heads they are.
        score: a column of heads.parquet, such as "induction" or "probe_induction".
    """
    heads = analysis.heads
    if analysis.facts["version"] > 1:
        return _numbers(heads, LOWER[score])
    if score == "successor":
        return np.full(len(heads), np.nan)
    fired = _numbers(heads, "probe_fired" if score.startswith("probe_") else "n_fired")
    return np.where(fired >= LEAST_FIRED, _numbers(heads, score), np.nan)


def measured_on(analysis: Analysis, kind: str) -> str:
    """Return what a score is measured on: "both" (text and probes), "text", or "words"."""
    if kind == "successor":
        return "words"
    return "both" if analysis.facts["with_model"] else "text"


def trusted(analysis: Analysis, kind: str) -> Scores:
    """Return how far each head can be trusted to be of a type, NaN where nothing can be told.

    Args:
        analysis: without a model it has no probes, and text speaks alone.
        kind: one of KINDS in choices.py.

    Returns:
        0..1, [n_heads].
    """
    if measured_on(analysis, kind) != "both":
        return bound(analysis, kind)
    return np.minimum(bound(analysis, kind), bound(analysis, f"probe_{kind}"))  # of NaN it is NaN


def said_by(analysis: Analysis) -> list[str | None]:
    """Return by what each head has its type, one of BY; None of a head that is of no type."""
    heads = analysis.heads
    if analysis.facts["version"] > 1:
        by: list[str | None] = heads["type_by"].to_pylist()
        return by
    probes = {kind: bound(analysis, f"probe_{kind}") for kind in STORE_SCORES}
    scores = {kind: trusted(analysis, kind) for kind in STORE_SCORES}
    found: list[str | None] = []
    for head, kind in enumerate(heads["type"].to_pylist()):
        if kind not in scores:
            found.append(None)
        elif scores[kind][head] >= LABEL_FROM:
            found.append("both" if analysis.facts["with_model"] else "text")
        else:
            found.append("text" if np.isnan(probes[kind][head]) else "disputed")
    return found


def trusted_types(analysis: Analysis) -> Scores:
    """Return how far each head can be trusted to be of its own type, NaN where it cannot be told.

    A head whose type text and probes do not both give has NaN, but without probes.
    """
    score = np.full(analysis.heads.num_rows, np.nan)
    types = np.array(analysis.heads["type"].to_pylist(), dtype=object)
    for kind in STORE_SCORES:
        mine = types == kind
        score[mine] = trusted(analysis, kind)[mine]
    score[score < LABEL_FROM] = np.nan
    return score


def of_type(analysis: Analysis, kind: str) -> list[int]:
    """Return the heads that can be called by a type and by no other, the best first.

    A head's trust is at least LABEL_FROM, and it is the type by its largest share too, in text and
    on probes: one that is local in text and previous-token on probes is named by neither.
    """
    score = trusted(analysis, kind)
    named = score >= LABEL_FROM
    if kind != "successor":
        names = [np.array(analysis.heads["type"].to_pylist(), dtype=object)]
        names += [_largest(analysis, prefix) for prefix in _measures(analysis)]
        named &= np.logical_and.reduce([each == kind for each in names])
    ranked = np.argsort(-score, kind="stable")  # NaN comes last
    return [int(head) for head in ranked if named[head]]


class Start(NamedTuple):
    """Heads to start with, of one kind."""

    kind: str
    """One of KINDS in choices.py"""
    heads: list[int]
    """The best of those that can be trusted to be of it; none where none can"""
    scores: list[float]
    """Trust in each"""
    best: float | None
    """The largest score of any head, of whatever type; None where nothing can be told"""


def starts(analysis: Analysis, n: int = N_STARTS) -> list[Start]:
    """Return heads to start with: the best of each kind, which a page names."""
    found = []
    for kind in KINDS:
        score = trusted(analysis, kind)
        heads = of_type(analysis, kind)[:n]
        known = score[~np.isnan(score)]
        best = float(known.max()) if len(known) else None
        found.append(Start(kind, heads, [float(score[head]) for head in heads], best))
    return found


class Agreed(NamedTuple):
    """Count of heads that are named, and of those whose name holds."""

    named: int
    """Heads that a page names as of a kind"""
    agreed: int
    """Those that are called so, fired often, and are so by their largest share, in both"""


def count_agreed(analysis: Analysis, n: int = N_STARTS) -> Agreed:
    """Return how many of the heads that a page names have that type in text and on probes.

    By the shares themselves, not by the bounds that they are chosen by. Successors, which are
    measured on words, are not counted.
    """
    named = [(start.kind, head) for start in starts(analysis, n) for head in start.heads]
    rows = [(kind, analysis.head(head)) for kind, head in named if kind != "successor"]
    agreed = [
        row["type"] == kind
        and min(row["n_fired"], row["probe_fired"] or 0) >= LEAST_FIRED
        and all(label({n: row[f"{on}{n}"] for n in STORE_SCORES}) == kind for on in ("", "probe_"))
        for kind, row in rows
    ]
    return Agreed(len(agreed), sum(agreed))


def label(shares: dict[str, float | None]) -> str | None:
    """Return the type that a head is by its shares alone; None where it is of none.

    It is the largest that is at least half. local and long_range, which hold others, count only
    where none of those is.
    """
    for names in (STORE_SCORES[:N_SINGLE], STORE_SCORES[N_SINGLE:]):
        best = max(names, key=lambda name: shares[name] or 0.0)
        if (shares[best] or 0.0) >= LABEL_FROM:
            return best
    return None


def _measures(analysis: Analysis) -> list[str]:
    """Return the prefixes of columns with shares that were measured."""
    return ["", "probe_"] if analysis.facts["with_model"] else [""]


def _largest(analysis: Analysis, prefix: str) -> NDArray[np.object_]:
    """Return what each head is by its shares in text ("") or on probes ("probe_"), [n_heads]."""
    columns = [analysis.heads[f"{prefix}{name}"].to_pylist() for name in STORE_SCORES]
    rows = zip(*columns, strict=True)
    found = [label(dict(zip(STORE_SCORES, row, strict=True))) for row in rows]
    return np.array(found, dtype=object)


def _numbers(heads: pa.Table, name: str) -> Scores:
    """Return a column as float64, null as NaN."""
    return numbers(heads[name].cast(pa.float64()))
