"""Which files of a store are committed: the journal, and shards.parquet in the end.

The journal is a folder with one file of JSON lines per writer process. A line is written, and
forced to the disk, after the shard's files are: a line that is there tells of files that are
whole. A line torn by a crash is the last of its file and is passed over; its shard is written
again.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import StoreError
from .manifest import sync

JOURNAL = "journal"
TABLE = "shards.parquet"
LOCK = "lock"
TEXT = "text"
"""Name of the journal file that tells of tokens and documents."""


class Entry(NamedTuple):
    """One committed file: one shard of one array."""

    shard: int
    array: str
    """Its path in the store, such as layers/12/attn_in."""
    n_seq: int
    n_bytes: int
    crc32c: int
    """Of the file."""
    norm_sum: float
    """sum ||x|| over the finite tokens; of `norms` where y is derived, sum ||y||; of int8's scales,
    their sum; else 0."""
    square_sum: float
    """The sum of the squares of the same."""
    n_nonfinite: int = 0
    """Tokens with NaN or Inf."""
    max_scale: float = 0.0
    """Largest of int8's scales; 0 for all other arrays."""


_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("array", pa.string()),
        ("n_seq", pa.int32()),
        ("n_bytes", pa.int64()),
        ("crc32c", pa.uint32()),
        ("norm_sum", pa.float64()),
        ("square_sum", pa.float64()),
        ("n_nonfinite", pa.int64()),
        ("max_scale", pa.float64()),
    ]
)


class JournalWriter:
    """Appends this process's commits to its own file."""

    def __init__(self, store: Path, name: str | None = None) -> None:
        """Choose a name; without one, it is a new one."""
        self._path = store / JOURNAL / f"{name or uuid.uuid4().hex[:12]}.jsonl"
        self._is_new = not self._path.exists()

    def commit(self, entries: Iterable[Entry]) -> None:
        """Record files that are on the disk, all of them in one line."""
        line = json.dumps([entry._asdict() for entry in entries]) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if self._is_new:
                sync(self._path.parent)
                self._is_new = False
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be written ({error.strerror}); what was committed is safe: "
                "make room and run the same command again"
            ) from None


def read_journal(store: Path) -> list[Entry]:
    """Return every file that any writer committed; of one written twice, one."""
    found: dict[tuple[int, str], Entry] = {}
    for path in sorted((store / JOURNAL).glob("*.jsonl")):
        for entry in _read_lines(path):
            found[entry.shard, entry.array] = entry
    return list(found.values())


def _read_lines(path: Path) -> Iterator[Entry]:
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            entries = [Entry(**fields) for fields in json.loads(line)]
        except (ValueError, TypeError):
            raise StoreError(f"{path} has a damaged line; {_remedy(path)}") from None
        yield from entries


def _remedy(path: Path) -> str:
    if path.stem == TEXT:
        return "delete the store and harvest again"
    return "delete that file and run the harvest again: it redoes the shards that the file told of"


def write_table(store: Path, entries: Iterable[Entry]) -> None:
    """Write shards.parquet."""
    rows = [entry._asdict() for entry in sorted(entries)]
    partial = store / f"{TABLE}.partial"
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, store / TABLE)


def read_table(store: Path) -> list[Entry]:
    """Read shards.parquet.

    Raises:
        StoreError: missing, damaged or of another schema.
    """
    path = store / TABLE
    try:
        table = pq.read_table(path, schema=_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"{path} cannot be read ({reason}); restore it from a copy or harvest again"
        ) from None
    return [Entry(**row) for row in table.to_pylist()]


class Lock:
    """One writer for a store at a time; the lock ends with its process, however that ends."""

    def __init__(self, store: Path) -> None:
        (store / JOURNAL).mkdir(parents=True, exist_ok=True)
        self._file: Any = (store / JOURNAL / LOCK).open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise StoreError(
                f"{store} is being written by another process; "
                "wait for it or choose another --store"
            ) from None
        except OSError as error:
            self._file.close()
            raise StoreError(f"{store} cannot be locked ({error.strerror})") from None

    def release(self) -> None:
        """Let others write."""
        self._file.close()
