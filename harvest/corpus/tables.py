"""Documents of tables, a row each: .csv and .tsv, .parquet, and Arrow files and streams."""

import csv
import mmap
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .choices import suffix_of
from .counts import Counts
from .document import Column, Document
from .forms import FileError, open_text

ROWS_AT_ONCE = 256
CSV_FIELD_CHARACTERS = 1 << 28
"""Longest field of a .csv file: a quote that is not closed would run on to the file's end."""


def csv_documents(file: Path, name: str, column: Column, counts: Counts) -> Iterator[Document]:
    """Yield a column of a .csv table; pyarrow's reader would hold many blocks, each above a row.

    Raises:
        FileError: the file is no text.
        ColumnError: the file lacks the column, or the column is of another type.
    """
    csv.field_size_limit(CSV_FIELD_CHARACTERS)
    with open_text(file, name, counts, newline="") as stream:
        rows = csv.reader(stream, delimiter="\t" if suffix_of(file) == ".tsv" else ",")
        names = next(rows, [])
        if any("\0" in one for one in names):
            raise FileError("no_text_files", f"data {file}: is no text")
        column.require_once(str(file), names)
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


def parquet_documents(file: Path, name: str, column: Column, counts: Counts) -> Iterator[Document]:
    """Yield a column of a .parquet table.

    Raises:
        ColumnError: the file lacks the column, or the column is of another type.
    """
    # without buffer_size and pre_buffer a whole row group is read at once
    with (
        file.open("rb") as stream,
        pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False) as table,
    ):
        _require_column(file, table.schema_arrow, column)
        batches = table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column.name])
        yield from _of_arrays((batch.column(0) for batch in batches), name, column, counts)


def arrow_documents(file: Path, name: str, column: Column, counts: Counts) -> Iterator[Document]:
    """Yield a column of an Arrow IPC file or of a stream, which is what `datasets` writes.

    Raises:
        ColumnError: the file lacks the column, or the column is of another type.
    """
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    source = pa.BufferReader(pa.py_buffer(mapped))
    try:
        table = pa.ipc.open_file(source)
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        table = batches = pa.ipc.open_stream(source)
    _require_column(file, table.schema, column)
    arrays = (
        whole.slice(first, ROWS_AT_ONCE)
        for whole in (batch.column(column.name) for batch in batches)
        for first in range(0, len(whole), ROWS_AT_ONCE)
    )
    yield from _of_arrays(arrays, name, column, counts)


def _require_column(file: Path, schema: Any, column: Column) -> None:
    """Raise ColumnError unless a table has the column once, of a type that fits."""
    column.require_once(str(file), schema.names)
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
    """Whether values are text; bytes are, for old writers leave out the mark of UTF-8."""
    of = pa.types
    tests = (of.is_string, of.is_large_string, of.is_string_view, of.is_null)
    as_bytes = (of.is_binary, of.is_large_binary, of.is_binary_view)
    return any(test(kind) for test in (*tests, *as_bytes))


def _of_arrays(
    arrays: Iterator[Any], name: str, column: Column, counts: Counts
) -> Iterator[Document]:
    """Yield the documents of a column's arrays."""
    number = 0
    for array in arrays:
        for value in _values(array, column):
            where = f"{name}:{number}"
            doc = None if value is None else column.document(where, value)
            if doc is not None:
                yield doc
            else:
                counts.add("null_rows" if value is None else "other_rows", where)
            number += 1


def _values(array: Any, column: Column) -> Iterator[Any]:
    """Yield text as bytes, which may be invalid UTF-8, and token ids as an array; None for null."""
    if column.is_ids:
        for row in array:
            # nulls among the ids make them floats, which `Column.document` does not take
            yield row.values if row.values is None else row.values.to_numpy(zero_copy_only=False)
    else:
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        yield from array.cast(pa.large_binary()).to_pylist()
