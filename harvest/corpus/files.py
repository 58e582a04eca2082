"""Documents of local files, read as a stream: memory does not grow with a file's size.

    .txt .text .md .markdown .rst .py            a document; in parts of PART_CHARACTERS if longer
    .jsonl .ndjson .json                         a document a line
    .csv .tsv .parquet .arrow .feather .ipc      a document a row

Text, lines and .csv may be compressed: .gz .zst .bz2 .xz .lz4. A file of another kind that is given
by its name is read as text.
"""

import csv
import json
import lzma
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import HarvestError
from .choices import (
    ARROW_SUFFIXES,
    CSV_SUFFIXES,
    KNOWN_SUFFIXES,
    LINE_SUFFIXES,
    suffix_of,
)
from .counts import Counts
from .document import Column, ColumnError, Document, documents_of_rows
from .folder import files_below
from .forms import FileError, open_text, require_data
from .tables import arrow_documents, csv_documents, parquet_documents

PART_CHARACTERS = 16_000_000


class LocalFiles:
    """The documents of a file or a folder."""

    def __init__(self, root: Path, column: Column) -> None:
        """Find the files.

        Raises:
            HarvestError: there is no file of a known kind.
        """
        self._root = root
        self._column = column
        self._files, self._found = ([root], Counts()) if root.is_file() else files_below(root)
        self.facts: dict[str, Any] = {}
        self.problem: HarvestError | None = None
        """Error that says better than counts why nothing was read."""

    def read(self, rng: Any, counts: Counts) -> Iterator[Document]:
        """Yield the documents of all files, the files in an order drawn from rng."""
        counts.merge(self._found)
        files = list(self._files)
        rng.shuffle(files)
        for file in files:
            name = file.name if file == self._root else str(file.relative_to(self._root))
            try:
                yield from read_file(file, name, self._column, counts)
                counts.keep("files")
            except FileError as error:
                counts.add(error.kind, name)
                self._keep(error, file)
            except ColumnError as error:
                counts.add("no_column_files", name)
                self._keep(error, file)

    def _keep(self, error: HarvestError, file: Path) -> None:
        """Keep the first error that says most: of a file given by name, of a column, a pointer."""
        is_told = isinstance(error, ColumnError) or getattr(error, "kind", "") == "pointer_files"
        if self.problem is None and (file == self._root or is_told):
            self.problem = error


def read_file(file: Path, name: str, column: Column, counts: Counts) -> Iterator[Document]:
    """Yield the documents of one file.

    Raises:
        FileError: the file is of another kind than its name says, or cannot be read to its end.
        ColumnError: the file lacks the column, or the column is of another type.
    """
    suffix = suffix_of(file)
    try:
        require_data(file)
        if suffix in LINE_SUFFIXES:
            yield from _lines(file, name, column, counts)
        elif suffix in CSV_SUFFIXES:
            yield from csv_documents(file, name, column, counts)
        elif suffix == ".parquet":
            yield from parquet_documents(file, name, column, counts)
        elif suffix in ARROW_SUFFIXES:
            yield from arrow_documents(file, name, column, counts)
        elif column.is_ids:
            raise column.missing(str(file), ())
        else:
            yield from _text(file, name, counts)
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException, csv.Error) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileError("unreadable_files", f"data {file}: cannot be read ({reason})") from None


def _text(file: Path, name: str, counts: Counts) -> Iterator[Document]:
    held, n_parts = "", 0
    with open_text(file, name, counts) as stream:
        while True:
            held += stream.read(PART_CHARACTERS - len(held))
            if "\0" in held:
                raise FileError(
                    "no_text_files",
                    f"data {file}: has NUL bytes, so it is no text; give "
                    f"{', '.join(KNOWN_SUFFIXES)}",
                )
            if len(held) < PART_CHARACTERS:
                break
            end = held.rfind("\n") + 1 or len(held)
            yield Document(f"{name}:{n_parts}", held[:end])
            held, n_parts = held[end:], n_parts + 1
    if n_parts:
        counts.add("parted_files", name)
    if held or not n_parts:
        yield Document(f"{name}:{n_parts}" if n_parts else name, held)


def _lines(file: Path, name: str, column: Column, counts: Counts) -> Iterator[Document]:
    with open_text(file, name, counts) as stream:
        rows = _json_objects(stream, file, name, counts)
        yield from documents_of_rows(rows, column, where=str(file), counts=counts)


def _json_objects(
    stream: Any, file: Path, name: str, counts: Counts
) -> Iterator[tuple[str, dict[str, Any]]]:
    first_error, n_objects = None, 0
    for number, line in enumerate(stream):
        if line.isspace():
            continue
        reason = "no object"
        with suppress(RecursionError):
            try:
                row = json.loads(line)
            except ValueError as error:
                row, reason = None, str(error)
            if isinstance(row, dict):
                n_objects += 1
                yield f"{name}:{number}", row
                continue
        first_error = first_error or f"data {file}: line {number + 1} is no JSON object ({reason})"
        if suffix_of(file) == ".json" and not n_objects:
            raise FileError("no_lines_files", f"{first_error}; give a file of one object a line")
        counts.add("bad_lines", f"{name}:{number}")
    if first_error and not n_objects:
        raise FileError("no_lines_files", first_error)
