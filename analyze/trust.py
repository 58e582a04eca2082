"""Trust in the types of heads: the smaller of what text and probes say, by lower bounds.

    trusted = min(bound of the share in text, bound of the share on probes)

A bound is a column `KIND_low` of heads.parquet. Analyses of version 1 have none: there it is the
share itself, of heads that fired often enough, and no head is known to be a successor.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..store.parquet import numbers
from .choices import LABEL_FROM, LEAST_FIRED, LOWER
from .result import Analysis

Scores = NDArray[np.float64]


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
        kind: one of STORE_SCORES, or "successor".

    Returns:
        0..1, [n_heads].
    """
    if measured_on(analysis, kind) != "both":
        return bound(analysis, kind)
    return np.minimum(bound(analysis, kind), bound(analysis, f"probe_{kind}"))  # of NaN it is NaN


def of_type(analysis: Analysis, kind: str) -> list[int]:
    """Return the heads that are called by a type and can be trusted to be of it, the best first."""
    score = trusted(analysis, kind)
    called = [kind] * len(score) if kind == "successor" else analysis.heads["type"].to_pylist()
    ranked = np.argsort(-score, kind="stable")  # NaN comes last
    return [int(head) for head in ranked if score[head] >= LABEL_FROM and called[head] == kind]


def _numbers(heads: pa.Table, name: str) -> Scores:
    """Return a column as float64, null as NaN."""
    return numbers(heads[name].cast(pa.float64()))
