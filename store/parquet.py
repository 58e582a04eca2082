"""Parquet tables of a store, whose footer is looked at before anything is decoded."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

MOST_INFLATION = 1000
"""Bytes before compression that a byte of the file may stand for; names of files reach 100."""
LEAST_MOST_BYTES = 64 << 20
"""Bytes before compression that any file may hold, however small it is."""


def write_parquet(table: pa.Table) -> bytes:
    """Return the content of a Parquet file, with a checksum in every page."""
    content = pa.BufferOutputStream()
    pq.write_table(table, content, write_page_checksum=True)
    written: bytes = content.getvalue().to_pybytes()
    return written


def read_parquet(
    content: bytes,
    most_rows: int,
    *,
    schema: pa.Schema | None = None,
    texts: Sequence[str] = (),
) -> pa.Table:
    """Return the table of a Parquet file, with the metadata of its footer.

    Args:
        content: the file.
        most_rows: rows that it may have.
        schema: of the table; as the file has it without one.
        texts: columns of text, which stay dictionaries: few texts may be in many rows.

    Raises:
        pa.ArrowException, OSError: it is none, is damaged, or of another schema.
        ValueError: it says that it holds more than it may.
    """
    footer = pq.ParquetFile(pa.BufferReader(content)).metadata
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    n_bytes = sum(group.total_byte_size for group in groups)
    if footer.num_rows > most_rows:
        raise ValueError(f"it has {footer.num_rows:,} rows, and may have {most_rows:,}")
    if n_bytes > max(LEAST_MOST_BYTES, MOST_INFLATION * len(content)):
        raise ValueError(f"{len(content):,} bytes of it stand for {n_bytes:,}")
    table = pq.read_table(
        pa.BufferReader(content),
        schema=schema,
        read_dictionary=list(texts),
        page_checksum_verification=True,
    )
    return table.replace_schema_metadata(footer.metadata)
