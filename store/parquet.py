"""Parquet tables read without pandas, half a second that pyarrow's own short ways import."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq


class Part(NamedTuple):
    """Rows of a table that is sorted by a column of whole numbers."""

    column: str
    """Column by which it is sorted; no row is null there"""
    values: range
    """Consecutive values of the rows that are meant"""


def read_parquet(
    source: Path | pa.NativeFile, schema: pa.Schema, *, part: Part | None = None, sums: bool = False
) -> pa.Table:
    """Read a table in a schema: columns that are not there are null, others are passed over.

    Args:
        source: file.
        schema: of the result.
        part: rows to read; None reads all.
        sums: whether to compare the checksums of pages.

    Raises:
        OSError: it cannot be read.
        pyarrow.ArrowException: it is damaged, or a column is of another kind.
    """
    with pq.ParquetFile(source, page_checksum_verification=sums) as file:
        there = [name for name in schema.names if name in file.schema_arrow.names]
        if part is None:
            table = file.read(columns=there)
        else:
            table = file.read_row_groups(_groups(file, part), columns=there)
            at = numbers(table[part.column])
            first, stop = np.searchsorted(at, [part.values.start, part.values.stop])
            table = table.slice(first, stop - first)
    columns = [
        table[field.name].cast(field.type)
        if field.name in there
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


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
