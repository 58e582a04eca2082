"""Documents of a corpus, the column that holds them, and counts of what is passed over."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import HarvestError

PASSED_OVER = {
    "empty_documents": ("empty document", "empty documents"),
    "null_rows": ("row without a value", "rows without a value"),
    "other_rows": ("row with a value of another type", "rows with a value of another type"),
    "bad_lines": ("line that is no JSON object", "lines that are no JSON objects"),
    "bad_rows": ("row with a wrong number of fields", "rows with a wrong number of fields"),
    "no_text_files": ("file that is no text", "files that are no text"),
    "no_lines_files": ("file that is no JSON lines", "files that are no JSON lines"),
    "no_column_files": ("file without the column", "files without the column"),
    "unreadable_files": ("file not read to its end", "files not read to their end"),
    "unreadable_folders": ("folder that cannot be read", "folders that cannot be read"),
    "other_files": ("file of another kind", "files of other kinds"),
    "foreign_documents": (
        "document with token ids that the model does not have",
        "documents with token ids that the model does not have",
    ),
    "foreign_tokens": (
        "token that the model does not have",
        "tokens that the model does not have",
    ),
    "short_documents": ("document shorter than n_ctx", "documents shorter than n_ctx"),
}
"""Kinds of what is left out, each as one and as several are called."""
CHANGED = {
    "repaired_documents": ("document with invalid UTF-8", "documents with invalid UTF-8"),
    "parted_files": ("file read in parts", "files read in parts"),
    "cut_documents": ("document cut to n_ctx", "documents cut to n_ctx"),
}
"""Kinds of what is stored in another form, each as one and as several are called."""
SHOWN_COLUMNS = 20
"""Most names in the message about a missing column."""
PROVING_ROWS = 256
"""Rows that prove a table to lack the column, if all of them do."""

TokenIds = np.ndarray[Any, Any]
"""Token ids, integers, [n]."""


class Counts:
    """Numbers of what was passed over or changed, by kind, and the first example of each."""

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, kind: str, example: str, n: int = 1) -> None:
        """Add n to the count of a kind of PASSED_OVER or CHANGED."""
        self._numbers[kind] += n
        self._examples.setdefault(kind, example if example.isprintable() else repr(example))

    def __getitem__(self, kind: str) -> int:
        return self._numbers[kind]

    def merge(self, other: "Counts") -> None:
        """Add the counts of another."""
        for kind, n in other._numbers.items():
            self.add(kind, other._examples[kind], n)

    def to_dict(self) -> dict[str, int]:
        """Return the counts above zero, by kind, for the store's manifest."""
        return {kind: n for kind, n in sorted(self._numbers.items()) if n}

    def __str__(self) -> str:
        """Return "passed over: 3 empty documents (a.txt), ...; changed: ..."; "" if nothing was."""
        found = {"passed over": self._listed(PASSED_OVER), "changed": self._listed(CHANGED)}
        return "; ".join(f"{what}: {text}" for what, text in found.items() if text)

    def _listed(self, kinds: Mapping[str, tuple[str, str]]) -> str:
        found = []
        for kind, (one, several) in kinds.items():
            if n := self._numbers[kind]:
                example = f"{'' if n == 1 else 'such as '}{self._examples[kind]}"
                found.append(f"{n:,} {one if n == 1 else several} ({example})")
        return ", ".join(found)


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
