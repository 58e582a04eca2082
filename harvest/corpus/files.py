"""Documents of local files, read as a stream: memory does not grow with a file's size.

    .txt .text .md .markdown .rst .py            a document; in parts of PART_CHARACTERS if longer
    .jsonl .ndjson .json                         a document a line
    .csv .tsv .parquet .arrow .feather .ipc      a document a row

Text, lines and .csv may be compressed: .gz .zst .bz2. A file of another kind that is given by its
name is read as text.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import HarvestError
from .choices import (
    ARROW_SUFFIXES,
    CSV_SUFFIXES,
    KNOWN_SUFFIXES,
    LINE_SUFFIXES,
    suffix_of,
)
from .document import Column, ColumnError, Counts, Document, documents_of_rows

PART_CHARACTERS = 16_000_000
ROWS_AT_ONCE = 256
CSV_FIELD_CHARACTERS = 1 << 28
"""Longest field of a .csv file: a quote that is not closed would run on to the file's end."""


class FileError(HarvestError):
    """File that has no documents, or cannot be read to its end."""

    def __init__(self, kind: str, message: str) -> None:
        """Take the kind that `Counts` counts the file as."""
        super().__init__(message)
        self.kind = kind


class LocalFiles:
    """The documents of a file or a folder."""

    def __init__(self, root: Path, column: Column) -> None:
        """Find the files.

        Raises:
            HarvestError: there is no such path, or no file of a known kind.
        """
        self._root = root
        self._column = column
        self._found = Counts()
        self._files = [root] if root.is_file() else self._of_folder()
        self.facts: dict[str, Any] = {}
        self.problem: HarvestError | None = None
        """Error that says better than counts why nothing was read."""

    def _of_folder(self) -> list[Path]:
        root, files = self._root, []
        for folder, inner, names in os.walk(root, onerror=self._unreadable):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                if path.is_file() and suffix_of(path) in KNOWN_SUFFIXES:
                    files.append(path)
                elif path.is_file():
                    self._found.add("other_files", str(path.relative_to(root)))
        if not files:
            raise HarvestError(f"data {root}: the folder has no {', '.join(KNOWN_SUFFIXES)} file")
        return sorted(files)

    def _unreadable(self, error: OSError) -> None:
        self._found.add("unreadable_folders", str(error.filename))

    def read(self, rng: Any, counts: Counts) -> Iterator[Document]:
        """Yield the documents of all files, the files in an order drawn from rng."""
        counts.merge(self._found)
        files = list(self._files)
        rng.shuffle(files)
        for file in files:
            name = file.name if file == self._root else str(file.relative_to(self._root))
            try:
                yield from read_file(file, name, self._column, counts)
            except FileError as error:
                counts.add(error.kind, name)
                self._keep(error, file)
            except ColumnError as error:
                counts.add("no_column_files", name)
                self._keep(error, file)

    def _keep(self, error: HarvestError, file: Path) -> None:
        """Keep the first error that says most: of a file given by name, or of a column."""
        if self.problem is None and (file == self._root or isinstance(error, ColumnError)):
            self.problem = error


def read_file(file: Path, name: str, column: Column, counts: Counts) -> Iterator[Document]:
    """Yield the documents of one file.

    Raises:
        FileError: the file is of another kind than its name says, or cannot be read to its end.
        ColumnError: the file lacks the column, or the column is of another type.
    """
    suffix = suffix_of(file)
    try:
        if suffix in LINE_SUFFIXES:
            yield from _lines(file, name, column, counts)
        elif suffix in CSV_SUFFIXES:
            yield from _csv(file, name, column, counts)
        elif suffix == ".parquet":
            yield from _of_batches(_parquet(file, column), name, column, counts)
        elif suffix in ARROW_SUFFIXES:
            yield from _of_batches(_arrow(file, column), name, column, counts)
        elif column.is_ids:
            raise column.missing(str(file), ())
        else:
            yield from _text(file, name, counts)
    except (OSError, pa.ArrowException, csv.Error) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileError("unreadable_files", f"data {file}: cannot be read ({reason})") from None


def _open(file: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Open text, compressed or not; invalid UTF-8 becomes surrogates."""
    stream = pa.input_stream(str(file), compression="detect", buffer_size=1 << 20)
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=newline)


def _text(file: Path, name: str, counts: Counts) -> Iterator[Document]:
    held, n_parts = "", 0
    with _open(file) as stream:
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
    with _open(file) as stream:
        rows = _json_objects(stream, file, name, counts)
        yield from documents_of_rows(rows, column, where=str(file), counts=counts)


def _json_objects(
    stream: io.TextIOWrapper, file: Path, name: str, counts: Counts
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


def _csv(file: Path, name: str, column: Column, counts: Counts) -> Iterator[Document]:
    """Yield a column of a .csv table; pyarrow's reader would hold many blocks, each above a row."""
    csv.field_size_limit(CSV_FIELD_CHARACTERS)
    with _open(file, newline="") as stream:
        rows = csv.reader(stream, delimiter="\t" if suffix_of(file) == ".tsv" else ",")
        names = next(rows, [])
        if any("\0" in one for one in names):
            raise FileError("no_text_files", f"data {file}: is no text")
        if column.name not in names:
            raise column.missing(str(file), names)
        place = names.index(column.name)
        first = list(islice(rows, ROWS_AT_ONCE))
        values = [row[place] for row in first if len(row) == len(names)]
        if column.is_ids or (values and all(map(_is_number, values))):
            raise column.unfit(str(file), "text" if column.is_ids else "numbers")
        for number, row in enumerate(chain(first, rows)):
            if len(row) == len(names):
                yield Document(f"{name}:{number}", row[place])
            elif row:
                counts.add("bad_rows", f"{name}:{number}")


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _parquet(file: Path, column: Column) -> Iterator[Any]:
    # without buffer_size and pre_buffer a whole row group is read at once
    with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
        _require_column(file, table.schema_arrow, column)
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column.name]):
            yield batch.column(0)


def _arrow(file: Path, column: Column) -> Iterator[Any]:
    """Yield a column of an Arrow IPC file or of a stream, which is what `datasets` writes."""
    with pa.memory_map(str(file)) as source:
        try:
            table = pa.ipc.open_file(source)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            table = batches = pa.ipc.open_stream(source)
        _require_column(file, table.schema, column)
        for batch in batches:
            whole = batch.column(column.name)
            for first in range(0, len(whole), ROWS_AT_ONCE):
                yield whole.slice(first, ROWS_AT_ONCE)


def _require_column(file: Path, schema: Any, column: Column) -> None:
    """Raise ColumnError unless a table has the column, of a type that fits."""
    if column.name not in schema.names:
        raise column.missing(str(file), schema.names)
    kind = schema.field(column.name).type
    inner = kind.value_type if pa.types.is_dictionary(kind) or _is_list(kind) else kind
    fits = (
        _is_list(kind) and pa.types.is_integer(inner)
        if column.is_ids
        else not _is_list(kind) and _is_text(inner)
    )
    if not fits:
        raise column.unfit(str(file), str(kind))


def _is_list(kind: Any) -> bool:
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


def _is_text(kind: Any) -> bool:
    of = pa.types
    return bool(
        of.is_string(kind)
        or of.is_large_string(kind)
        or of.is_string_view(kind)
        or of.is_null(kind)
    )


def _of_batches(
    batches: Iterator[Any], name: str, column: Column, counts: Counts
) -> Iterator[Document]:
    """Yield the documents of a column's arrays."""
    number = 0
    for batch in batches:
        for value in _values(batch, column):
            where = f"{name}:{number}"
            doc = None if value is None else column.document(where, value)
            if doc is not None:
                yield doc
            else:
                counts.add("null_rows" if value is None else "other_rows", where)
            number += 1


def _values(batch: Any, column: Column) -> Iterator[Any]:
    """Yield text as bytes, which may be invalid UTF-8, and token ids as an array; None for null."""
    if column.is_ids:
        for row in batch:
            # nulls among the ids make them floats, which `Column.document` does not take
            yield row.values if row.values is None else row.values.to_numpy(zero_copy_only=False)
    else:
        if pa.types.is_dictionary(batch.type):
            batch = batch.dictionary_decode()
        yield from batch.cast(pa.large_binary()).to_pylist()
