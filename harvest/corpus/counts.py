"""Counts of what a corpus passes over or changes, by kind, and what share of it that is."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

WARNING_SHARE = 0.1
"""Share of what was looked at above which what is passed over is worth a warning."""


class Kind(NamedTuple):
    """Kind of what is passed over or changed."""

    one: str
    """Name of one"""
    several: str
    """Name of several"""
    unit: str = ""
    """Unit whose share is taken; empty if nothing is lost by it"""


PASSED_OVER = {
    "empty_documents": Kind("empty document", "empty documents", "texts"),
    "garbled_documents": Kind("text that is not UTF-8", "texts that are not UTF-8", "texts"),
    "null_rows": Kind("row without a value", "rows without a value", "texts"),
    "other_rows": Kind(
        "row with a value of another type", "rows with a value of another type", "texts"
    ),
    "bad_lines": Kind("line that is no JSON object", "lines that are no JSON objects", "texts"),
    "bad_rows": Kind(
        "row with a wrong number of fields", "rows with a wrong number of fields", "texts"
    ),
    "no_text_files": Kind("file that is no text", "files that are no text", "files"),
    "no_lines_files": Kind("file that is no JSON lines", "files that are no JSON lines", "files"),
    "no_column_files": Kind("file without the column", "files without the column", "files"),
    "empty_files": Kind("file of no bytes", "files of no bytes", "files"),
    "pointer_files": Kind(
        "pointer in place of its data", "pointers in place of their data", "files"
    ),
    "unreadable_files": Kind("file not read to its end", "files not read to their end", "files"),
    "unreadable_folders": Kind(
        "folder that cannot be read", "folders that cannot be read", "entries"
    ),
    "partial_files": Kind("half-fetched file", "half-fetched files", "entries"),
    "missing_files": Kind(
        "file that a saved dataset lacks", "files that a saved dataset lacks", "entries"
    ),
    "dangling_links": Kind("link to nothing", "links to nothing", "entries"),
    "special_files": Kind("pipe, socket or device", "pipes, sockets or devices", "entries"),
    "archive_files": Kind("archive", "archives", "entries"),
    "other_files": Kind("file of another kind", "files of other kinds", "entries"),
    "upward_links": Kind("link to a folder it is in", "links to a folder they are in"),
    "double_links": Kind("link to what is read anyway", "links to what is read anyway"),
    "side_files": Kind("side file of a saved dataset", "side files of a saved dataset"),
    "hidden_files": Kind("hidden file or folder", "hidden files or folders"),
    "foreign_documents": Kind(
        "document with token ids that the model does not have",
        "documents with token ids that the model does not have",
        "documents",
    ),
    "foreign_tokens": Kind(
        "token that the model does not have", "tokens that the model does not have", "tokens"
    ),
    "short_documents": Kind(
        "document shorter than n_ctx", "documents shorter than n_ctx", "documents"
    ),
}
"""Kinds of what is left out."""
CHANGED = {
    "repaired_documents": Kind("document with invalid UTF-8", "documents with invalid UTF-8"),
    "converted_files": Kind("file in UTF-16 or UTF-32", "files in UTF-16 or UTF-32"),
    "parted_files": Kind("file read in parts", "files read in parts"),
    "cut_documents": Kind("document cut to n_ctx", "documents cut to n_ctx"),
}
"""Kinds of what is stored in another form."""
UNITS = {
    "entries": "files and folders",
    "files": "files read",
    "texts": "texts read",
    "documents": "documents packed",
    "tokens": "tokens",
}
"""Units of shares, as they are called in a warning."""


class Counts:
    """Numbers of what was passed over or changed, by kind, and the first example of each."""

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._kept: Counter[str] = Counter()

    def add(self, kind: str, example: str, n: int = 1) -> None:
        """Add n to the count of a kind of PASSED_OVER or CHANGED."""
        self._numbers[kind] += n
        self._examples.setdefault(kind, example if example.isprintable() else repr(example))

    def keep(self, unit: str, n: int = 1) -> None:
        """Add n to what was not passed over of a unit of UNITS."""
        self._kept[unit] += n

    def __getitem__(self, kind: str) -> int:
        return self._numbers[kind]

    def merge(self, other: "Counts") -> None:
        """Add the counts of another."""
        for kind, n in other._numbers.items():
            self.add(kind, other._examples[kind], n)
        self._kept.update(other._kept)

    def to_dict(self) -> dict[str, int]:
        """Return the counts above zero, by kind, for the store's manifest."""
        return {kind: n for kind, n in sorted(self._numbers.items()) if n}

    def warning(self) -> str:
        """Return "passed over: 3 of 12 files read, ...", units above WARNING_SHARE; "" if none."""
        lost: Counter[str] = Counter()
        for name, kind in PASSED_OVER.items():
            lost[kind.unit] += self._numbers[name]
        found = [
            f"{n:,} of {n + self._kept[unit]:,} {called}"
            for unit, called in UNITS.items()
            if (n := lost[unit]) > WARNING_SHARE * (n + self._kept[unit])
        ]
        return f"passed over: {', '.join(found)}" if found else ""

    def __str__(self) -> str:
        """Return "passed over: 3 empty documents (a.txt), ...; changed: ..."; "" if nothing was."""
        found = {"passed over": self._listed(PASSED_OVER), "changed": self._listed(CHANGED)}
        return "; ".join(f"{what}: {text}" for what, text in found.items() if text)

    def _listed(self, kinds: Mapping[str, Kind]) -> str:
        found = []
        for name, kind in kinds.items():
            if n := self._numbers[name]:
                example = f"{'' if n == 1 else 'such as '}{self._examples[name]}"
                found.append(f"{n:,} {kind.one if n == 1 else kind.several} ({example})")
        return ", ".join(found)
