"""Parquet tables read without pandas, half a second that pyarrow's own short ways import."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

MOST_INFLATION = 1000
"""Bytes before compression that a byte of the file may stand for; names of files reach 100."""
LEAST_MOST_BYTES = 64 << 20
"""Bytes before compression that any file may hold, however small it is."""


class Part(NamedTuple):
    """Rows of a table that is sorted by a column of whole numbers."""

    column: str
    """Column by which it is sorted; no row is null there"""
    values: range
    """Consecutive values of the rows that are meant"""


def read_parquet(source: Path, schema: pa.Schema, *, part: Part | None = None) -> pa.Table:
    """Read a table in a schema: columns that are not there are null, others are passed over.

    Args:
        source: file.
        schema: of the result.
        part: rows to read; None reads all.

    Raises:
        OSError: it cannot be read.
        pyarrow.ArrowException: it is damaged, or a column is of another kind.
    """
    with pq.ParquetFile(source) as file:
        there = [name for name in schema.names if name in file.schema_arrow.names]
        if part is None:
            table = file.read(columns=there)
        else:
            table = file.read_row_groups(_groups(file, part), columns=there)
            at = numbers(table[part.column])
            first, stop = np.searchsorted(at, [part.values.start, part.values.stop])
            table = table.slice(first, stop - first)
    return _in_schema(table, schema)


def _in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table in a schema, null in the columns that it does not have."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def write_parquet(table: pa.Table) -> bytes:
    """Return the content of a Parquet file, with a checksum in every page."""
    content = pa.BufferOutputStream()
    pq.write_table(table, content, write_page_checksum=True)
    written: bytes = content.getvalue().to_pybytes()
    return written


def read_bounded(
    content: bytes,
    most_rows: int,
    *,
    schema: pa.Schema | None = None,
    texts: Sequence[str] = (),
) -> pa.Table:
    """Return the table of a Parquet file, with its metadata; its footer is looked at first.

    Args:
        content: the file.
        most_rows: rows that it may have.
        schema: of the table, as in `read_parquet`; as the file has it without one.
        texts: columns of text, which stay dictionaries: few texts may be in many rows.

    Raises:
        pa.ArrowException, OSError: it is none, is damaged, or a column is of another kind.
        ValueError: it says that it holds more than it may.
    """
    source = pa.BufferReader(content)
    with pq.ParquetFile(
        source, read_dictionary=list(texts), page_checksum_verification=True
    ) as file:
        footer = file.metadata
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        n_bytes = sum(group.total_byte_size for group in groups)
        if footer.num_rows > most_rows:
            raise ValueError(f"it has {footer.num_rows:,} rows, and may have {most_rows:,}")
        if n_bytes > max(LEAST_MOST_BYTES, MOST_INFLATION * len(content)):
            raise ValueError(f"{len(content):,} bytes of it stand for {n_bytes:,}")
        # a thread of Arrow's that lets these bytes go as Python ends would abort it
        table = file.read(use_threads=False)
    found = table if schema is None else _in_schema(table, schema)
    return found.replace_schema_metadata(footer.metadata)


def numbers(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return a column of numbers, [rows]; as float64 with NaN where some are null."""
    if column.null_count or not len(column):
        return np.array(column.to_pylist(), np.float64)
    parts = [np.from_dlpack(chunk) for chunk in column.chunks if len(chunk)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _groups(file: pq.ParquetFile, part: Part) -> list[int]:
    """Return the row groups with rows of a part, by their statistics."""
    facts = file.metadata
    columns = [facts.schema.column(i).path for i in range(facts.num_columns)]
    column, found = columns.index(part.column), []
    for group in range(facts.num_row_groups):
        known = facts.row_group(group).column(column).statistics
        is_known = known is not None and known.has_min_max
        if not is_known or (known.max >= part.values.start and known.min < part.values.stop):
            found.append(group)
    return found
