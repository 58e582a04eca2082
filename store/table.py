"""The table of a finished store: shards.parquet, a row for each committed file.

Its metadata names its store and has a checksum of the values of all rows. Tables of version 0.1.0
have neither.
"""

import numpy as np
import pyarrow as pa

from ..errors import StoreError, UnreachableError, reason_of
from ..seal import crc32c, hexadecimal
from .entries import SCHEMA, Entries, array_names
from .manifest import Manifest
from .parquet import numbers, read_bounded, write_parquet
from .places import Place, reading, write_atomically

TABLE = "shards.parquet"
SEAL = b"lorsa_crc32c"
OWNER = b"lorsa_store"
"""Names in its metadata of the checksum of its values, and of the uuid of its store."""
ROW_BYTES = 4
"""Bytes that a row takes at least: its checksum, which cannot be compressed."""
_READ = SCHEMA.set(
    SCHEMA.get_field_index("array"), pa.field("array", pa.dictionary(pa.int32(), pa.string()))
)


def _checksum(table: pa.Table) -> str:
    """Return the crc32c of the values of all rows."""
    names, column = array_names(table)
    columns = [numbers(table.column(name)) for name in SCHEMA.names if name != "array"]
    crc = crc32c("\n".join(names).encode())
    for values in (column, *columns):
        crc = crc32c(np.ascontiguousarray(values), crc)
    return hexadecimal(crc)


def write_table(store: Place, entries: Entries, uuid: str) -> None:
    """Write shards.parquet of a store, which its uuid names, with a checksum in every page."""
    table = entries.to_arrow()
    seal = {SEAL: _checksum(table).encode(), OWNER: uuid.encode()}
    write_atomically(store / TABLE, write_parquet(table.replace_schema_metadata(seal)))


def read_table(store: Place, manifest: Manifest) -> Entries:
    """Read shards.parquet.

    Args:
        store: its place.
        manifest: its facts.

    Raises:
        UnreachableError: this machine failed.
        StoreError: missing, damaged, another store's, of another schema, or with a row that cannot
            be an entry.
    """
    path = store / TABLE
    try:
        with reading(path):
            content = path.read_bytes()
            table = read_bounded(content, len(content) // ROW_BYTES, schema=_READ, texts=["array"])
            _require_own(table, manifest)
            return Entries.from_arrow(table)
    except UnreachableError:
        raise
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        raise StoreError(
            f"{path} cannot be read ({reason_of(error)}); lorsa store verify {store} --repair "
            "makes it anew from the journal, or restore a copy"
        ) from None


def _require_own(table: pa.Table, manifest: Manifest) -> None:
    """Raise ValueError unless a table is of this store and says what was written."""
    found = table.schema.metadata or {}
    if SEAL not in found:
        if manifest.is_sealed:
            raise ValueError("it has no checksum")
        return
    if found[SEAL].decode("utf-8", "replace") != _checksum(table):
        raise ValueError("its checksum is wrong")
    if found.get(OWNER, b"").decode("utf-8", "replace") != manifest.uuid:
        raise ValueError("it is another store's")
