"""Heads of an analysis that can be called by name, each with a sentence and a context.

for head in named_heads("runs/layer-17", 3):
    print(head.head, head.sentence, head.context)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .found import evidence
from .result import Analysis
from .trust import measured_on, of_type, trusted

DOES = {
    "previous_token": "reads the token before the current one",
    "induction": "reads the token after an earlier copy of the current one",
    "duplicate_token": "reads earlier copies of the current token",
    "first_token": "reads the first token of the sequence",
    "same_token": "reads the current token itself",
    "local": "reads the eight tokens before the current one",
    "long_range": "reads tokens 64 or more before the current one",
}
"""Types in words, the most telling first."""
CONTEXTS = 8
"""Largest firings of which one is shown: words say more than spaces and brackets do."""
_MARKED = re.compile(r"<( ?\w\w+)>|\[( ?\w\w+)\]")
"""A word that fires, or that is read"""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedHead:
    """A head whose type can be trusted."""

    head: int
    """Number of the OV head."""
    type: str
    """One of DOES."""
    score: float
    """Lower bound of its share, the smaller of text and probes, 0..1."""
    on_text: float
    """Share of its reading that is of the type, in text."""
    on_probes: float | None
    """The same on probes; None where the analysis had no language model."""
    sentence: str
    """The type in words, with both shares."""
    context: str | None
    """Text around a firing <> and what was read [] there; None without examples."""


def named_heads(analysis: Analysis | str | Path, n: int) -> list[NamedHead]:
    """Return heads that can be called by name, the best of each type before the second best of any.

    A head is named only if it has its type in text and on probes, by the lower bounds of both.
    Of each rank, types are in the order of DOES.

    Args:
        analysis: open, or the folder of a run or of its analysis.
        n: heads to return at most; fewer, or none, where no more can be trusted.

    Raises:
        AnalyzeError: the folder has no whole analysis.
    """
    opened = analysis if isinstance(analysis, Analysis) else Analysis.open(analysis)
    found = [
        (rank, order, kind, head)
        for order, kind in enumerate(DOES)
        for rank, head in enumerate(of_type(opened, kind)[:n])
    ]
    return [_named(opened, kind, head) for _rank, _order, kind, head in sorted(found)[:n]]


def _named(analysis: Analysis, kind: str, head: int) -> NamedHead:
    row = analysis.head(head)
    on_probes = row[f"probe_{kind}"] if measured_on(analysis, kind) == "both" else None
    return NamedHead(
        head=head,
        type=kind,
        score=float(trusted(analysis, kind)[head]),
        on_text=row[kind],
        on_probes=on_probes,
        sentence=sentence(kind, row[kind], on_probes),
        context=_telling(evidence(analysis, head, CONTEXTS)),
    )


def _telling(contexts: Sequence[str]) -> str | None:
    """Return the context in which most of what is marked are words; of equals, the first."""
    return max(contexts, key=lambda context: len(_MARKED.findall(context)), default=None)


def sentence(kind: str, on_text: float, on_probes: float | None) -> str:
    """Return a type in words, with the shares that it is called by."""
    probes = "not tried on probes" if on_probes is None else f"{on_probes:.2f} on probes"
    return f"{DOES[kind]} ({on_text:.2f} of its reading in text, {probes})"
