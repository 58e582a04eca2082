"""Documents of a corpus, and the column that holds them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...errors import HarvestError
from .counts import Counts

SHOWN_COLUMNS = 20
"""Most names in the message about a missing column."""
PROVING_ROWS = 256
"""Rows that prove a table to lack the column, if all of them do."""

TokenIds = np.ndarray[Any, Any]
"""Token ids, integers, [n]."""


class Document(NamedTuple):
    """One text, or its tokens."""

    name: str
    """File, or file and row"""
    text: str = ""
    ids: TokenIds | None = None
    """Token ids, int64, if the corpus is tokenised already"""


class Column(NamedTuple):
    """Column of a table, or field of a JSON line, that holds the documents."""

    name: str
    is_ids: bool = False
    """Whether the column holds lists of token ids instead of text"""

    def document(self, name: str, value: Any) -> Document | None:
        """Return a value as a document; None if it is of another type.

        Args:
            name: name of the document.
            value: text, its bytes in UTF-8, or integers in a list or an array.
        """
        if self.is_ids:
            ids = _as_ids(value)
            return None if ids is None else Document(name, ids=ids)
        if isinstance(value, bytes):
            return Document(name, value.decode("utf-8", errors="surrogateescape"))
        return Document(name, value) if isinstance(value, str) else None

    def require_once(self, where: str, names: Sequence[str]) -> None:
        """Raise ColumnError unless the column is among a table's names, and only once."""
        if self.name not in names:
            raise self.missing(where, names)
        if (n := names.count(self.name)) > 1:
            raise ColumnError(
                f"data {where}: {n} columns are called {self.name!r}: rename all but one, or "
                f"choose another by {self._option}"
            )

    def missing(self, where: str, names: Iterable[str]) -> "ColumnError":
        """Return the error for a table that has other columns."""
        known = list(map(str, names))
        there = ", ".join(known[:SHOWN_COLUMNS]) or "none"
        there += f" and {len(known) - SHOWN_COLUMNS} more" if len(known) > SHOWN_COLUMNS else ""
        return ColumnError(
            f"data {where}: no column {self.name!r}; there is {there}; choose one by "
            + self._option
            + ("" if self.is_ids else ", or --tokens-column for ids")
        )

    def unfit(self, where: str, kind: str) -> "ColumnError":
        """Return the error for a column of another type."""
        wanted = "lists of token ids" if self.is_ids else "text"
        return ColumnError(
            f"data {where}: column {self.name!r} is {kind}, not {wanted}; "
            f"choose another by {self._option}"
        )

    @property
    def _option(self) -> str:
        return "--tokens-column" if self.is_ids else "--text-column"


def _as_ids(value: Any) -> TokenIds | None:
    """Return a list or an array of integers as int64, [n]; None for anything else."""
    if not isinstance(value, list | np.ndarray):
        return None
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of different lengths
        return None
    fits = ids.ndim == 1 and (ids.dtype.kind in "iu" or not len(ids))
    return ids.astype(np.int64) if fits else None


class ColumnError(HarvestError):
    """Table without the column, or with one of another type."""


def documents_of_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], column: Column, *, where: str, counts: Counts
) -> Iterator[Document]:
    """Yield the documents of rows, skipping rows without one.

    Args:
        rows: name and fields of each row.
        column: column that holds the document.
        where: origin of the rows, for messages.
        counts: counts of what is passed over, added to.

    Raises:
        ColumnError: all of the first rows lack the column, or have another type there.
    """
    problem, n_problems, proven = None, 0, False
    for name, row in rows:
        value = row.get(column.name)
        doc = None if value is None else column.document(name, value)
        if doc is not None:
            proven = True
            yield doc
            continue
        counts.add("null_rows" if value is None else "other_rows", name)
        if proven or (value is None and column.name in row):
            continue
        unfit = column.unfit(where, type(value).__name__)
        problem = problem or (column.missing(where, row) if value is None else unfit)
        n_problems += 1
        if n_problems == PROVING_ROWS:
            break
    if problem is not None and not proven:
        raise problem
