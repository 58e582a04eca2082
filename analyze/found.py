"""Heads of analysed runs that are most of a type, with evidence.

Scores are those of trust.py: lower bounds, the smaller of text and probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AnalyzeError
from ..printable import printable
from ..store.facts import StoreFacts
from ..store.places import Place
from .choices import LABEL_FROM, LEAST_FIRED
from .result import Analysis
from .trust import measured_on, trusted
from .type_names import spelled, type_named

WINDOW = 6
"""Tokens shown before and after a source or a firing token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundHead:
    """One head that is much of a type."""

    run: str | None
    """Run of the Lorsa; None for a head of the language model itself."""
    layer: int
    head: int
    """OV head of the Lorsa, or attention head of the language model."""
    score: float
    """Lower bound of the share of its reading that is of the type, 0..1; of text and probes, the
    smaller."""
    measured_on: str
    """"both" (text and probes), "text" or, of successors, "words"."""
    score_on_text: float | None
    """Share on stored text."""
    score_on_probes: float | None = None
    """Share on random tokens that are repeated once."""
    frequency: float | None = None
    """Share of tokens on which it fires; None for the language model's heads, which always do."""
    evidence: list[str] | None = None
    """Top examples: source tokens in [], the firing token in <>."""


def find_in_runs(
    kind: str,
    runs: Sequence[Path],
    *,
    store: str | Place | None = None,
    layers: list[int] | None = None,
    n: int = 10,
    least: float = LABEL_FROM,
) -> list[FoundHead]:
    """Return the heads of runs that are most of a type; see `find_heads`."""
    kind = type_named(kind)
    theirs = None if store is None else StoreFacts.open(store)
    found = [each for run in runs for each in _of_run(kind, run, theirs, n)]
    return best_of(kind, found, layers, n, least)


def best_of(
    kind: str, found: list[FoundHead], layers: list[int] | None, n: int, least: float
) -> list[FoundHead]:
    """Return the n best of some layers that have the least score, the best first.

    Raises:
        AnalyzeError: of no head there is anything to tell.
    """
    chosen = [each for each in found if layers is None or each.layer in layers]
    if not chosen:
        raise AnalyzeError(
            f"no head here has a score of {spelled(kind)}: it takes {LEAST_FIRED} firings in "
            "several sequences, on tokens that have such sources; analyze more --tokens, or name "
            "other --layers"
        )
    best = sorted(chosen, key=lambda each: -each.score)[:n]
    return [each for each in best if each.score >= least]


def _of_run(kind: str, run: Path, store: StoreFacts | None, n: int) -> list[FoundHead]:
    """Return the best heads of an analysed run."""
    analysis = Analysis.open(run)
    if store is not None and analysis.facts["store_uuid"] != store.manifest.uuid:
        raise AnalyzeError(f"{run} was analysed with another store, {analysis.facts['store']}")
    if kind == "successor" and not analysis.facts["with_model"]:
        raise AnalyzeError(f"{run} has no {kind} scores: analyze it again with --model")
    score = trusted(analysis, kind)
    ranked = np.argsort(-score, kind="stable")  # NaN comes last
    best = [int(head) for head in ranked[:n] if not np.isnan(score[head])]
    return [
        FoundHead(
            run=str(run),
            layer=analysis.facts["layer"],
            head=row["head"],
            score=float(score[row["head"]]),
            measured_on=measured_on(analysis, kind),
            score_on_text=row[kind],
            score_on_probes=row.get(f"probe_{kind}"),
            frequency=row["frequency"],
            evidence=evidence(analysis, row["head"]),
        )
        for row in map(analysis.head, best)
    ]


def evidence(analysis: Analysis, head: int, n: int = 3) -> list[str]:
    """Return n top examples of a head in words; position 0, which reads itself, comes last."""
    shown = sorted(analysis.examples(head), key=lambda example: example["position"] == 0)[:n]
    return [in_words(analysis, example) for example in shown]


def in_words(analysis: Analysis, example: dict[str, Any]) -> str:
    """Return an example in a line: source tokens in [], the firing token in <>, in their context.

    The two sources with the largest contributions are marked.

    Args:
        analysis: that the example is of.
        example: row of examples.parquet.
    """
    at = example["position"]
    sources = set(example["sources"][:2])
    shown = {i for s in {at, *sources} for i in range(s - WINDOW, s + 3)}
    line, last = "", None
    for places, text in analysis.passage(example["seq"]):
        if shown.isdisjoint(places):
            continue
        token = printable(text)
        token = token if sources.isdisjoint(places) else f"[{token}]"
        token = f"<{token}>" if at in places else token
        line += (" … " if last not in (None, places.start) else "") + token
        last = places.stop
    return line
