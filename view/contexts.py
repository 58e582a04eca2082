"""The contexts on a page, from examples.parquet: where heads fired, with the text around.

A context has the tokens around the one on which the head fired, in one stretch or, where the head
read from far away, in several.
"""

from operator import itemgetter
from typing import Any

from ..analyze.result import Analysis
from ..errors import AnalyzeError
from .columns import rounded

BEFORE, AFTER = 32, 8
"""Tokens shown before and after the one on which a head fired."""
BESIDE = 2
"""Tokens shown on each side of a source that lies outside."""
MAX_FAR = 6
"""Sources outside of the stretch that are shown at most, the largest first."""
JOIN = 3
"""Tokens between two stretches at most for them to become one."""


def stretches(position: int, sources: list[int], n_ctx: int) -> list[range]:
    """Return which positions of a sequence are shown, in order.

    Args:
        position: where the head fired.
        sources: where it read from, the largest contribution first.
        n_ctx: tokens in the sequence.
    """
    main = range(max(0, position - BEFORE), min(n_ctx, position + AFTER + 1))
    far = [source for source in sources if source not in main][:MAX_FAR]
    asked = [range(max(0, s - BESIDE), min(n_ctx, s + BESIDE + 1)) for s in far]
    found: list[range] = []
    for one in sorted([*asked, main], key=lambda one: one.start):
        if not found and one.start <= JOIN:
            found.append(range(one.stop))
        elif found and one.start - found[-1].stop <= JOIN:
            found[-1] = range(found[-1].start, max(found[-1].stop, one.stop))
        else:
            found.append(one)
    return found


def contexts(analysis: Analysis, heads: range) -> list[dict[str, list[dict[str, Any]]]]:
    """Return the contexts of consecutive heads, `top` and `sample` of each.

    Raises:
        AnalyzeError: the sequence of an example is missing.
    """
    found: list[dict[str, list[dict[str, Any]]]] = [{"top": [], "sample": []} for _ in heads]
    table = analysis.examples_of(heads)
    for row in sorted(table.to_pylist(), key=itemgetter("head", "rank")):
        found[row["head"] - heads.start][row["kind"]].append(_context(analysis, row))
    return found


def _context(analysis: Analysis, row: dict[str, Any]) -> dict[str, Any]:
    try:
        tokens = analysis.tokens(row["seq"])
    except KeyError:
        raise AnalyzeError(
            f"{analysis.root} has no tokens of sequence {row['seq']}, in which head "
            f"{row['head']} fired; delete its sequences.parquet and analyze again"
        ) from None
    shown = stretches(row["position"], row["sources"], len(tokens))
    act, rest, quantile = rounded((row["act"], row["rest"], row["quantile"]))
    return {
        "act": act,
        "rest": rest,
        "quantile": quantile,
        "seq": row["seq"],
        "position": row["position"],
        "token": row["token"],
        "document": row["document"],
        "parts": [[part.start, tokens[part.start : part.stop].tolist()] for part in shown],
        "joined": _joined(analysis, row["seq"], shown),
        "sources": row["sources"],
        "source_acts": rounded(row["source_acts"]),
    }


def _joined(analysis: Analysis, seq: int, shown: list[range]) -> list[list[Any]]:
    """Return the characters shown that lie in several tokens: the first, how many, the text."""
    return [
        [places.start, len(places), text]
        for part in shown
        for places, text in analysis.joined(seq, part)
    ]
