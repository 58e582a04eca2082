"""Which files of a store are committed: the journal, and shards.parquet in the end.

The journal is a folder with one file of JSON lines per writer process, read in the order of their
names, which is the order in which they were begun. A line is written, and forced to the disk, after
the shard's files are: a line that is there tells of files that are whole. A line torn by a crash is
the last of its file and is passed over; its shard is written again.

    [{"shard": 0, "array": "layers/12/attn_in", "n_seq": 64, ...}, ...]     committed
    {"dropped": [[0, "layers/12/attn_in"], ...]}                            no longer
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .bucket import BucketPath
from .errors import StoreError
from .lease import Lease
from .places import Place, sync, write_atomically

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


Key = tuple[int, str]
"""Shard and array of an entry."""
_ARRAY = re.compile(r"(layers/(0|[1-9][0-9]{0,8})/)?[a-z][a-z0-9_]*")
"""What an array can be called: nothing that could lead out of the store."""
_LARGEST = {
    "shard": 2**31 - 1,
    "n_seq": 2**31 - 1,
    "n_bytes": 2**63 - 1,
    "crc32c": 2**32 - 1,
    "n_nonfinite": 2**63 - 1,
}


def _entry(fields: dict[str, Any]) -> Entry:
    """Return an entry read from a disk; ValueError or TypeError if it cannot be one."""
    entry = Entry(**fields)
    _require_array(entry.array)
    for name, largest in _LARGEST.items():
        value = getattr(entry, name)
        if type(value) is not int or not 0 <= value <= largest:
            raise ValueError(f"{name} is {value!r}")
    if not (math.isfinite(entry.norm_sum) and math.isfinite(entry.square_sum)):
        raise ValueError("a sum is not finite")
    if not 0 <= entry.max_scale < math.inf:
        raise ValueError(f"max_scale is {entry.max_scale!r}")
    return entry


def _require_array(name: str) -> None:
    if not _ARRAY.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an array")


class JournalWriter:
    """Appends this process's commits to its own file. The lock is held."""

    def __init__(self, store: Place, name: str | None = None) -> None:
        """Choose a name; without one, it is a new one that comes after all others."""
        self._path = store / JOURNAL / f"{name or _next_name(store / JOURNAL)}.jsonl"
        self._is_new = not self._path.is_file()
        self._told = b""
        """In a bucket, the whole file."""
        if isinstance(self._path, BucketPath) and not self._is_new:
            self._told = self._path.read_bytes()

    def commit(self, entries: Iterable[Entry]) -> None:
        """Record files that are on the disk, all of them in one line."""
        self._append([entry._asdict() for entry in entries])

    def drop(self, keys: Iterable[Key]) -> None:
        """Record that files are no longer to be counted on, all of them in one line."""
        self._append({"dropped": sorted(keys)})

    def _append(self, content: Any) -> None:
        line = (json.dumps(content) + "\n").encode()
        if isinstance(self._path, BucketPath):  # nothing is appended to an object
            self._path.write_bytes(self._told + line)
            self._told += line
            return
        try:
            size = 0 if self._is_new else self._path.stat().st_size
            try:
                with self._path.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):  # a torn line must not be the beginning of the next
                    os.truncate(self._path, size)
                raise
            if self._is_new:
                sync(self._path.parent)
                self._is_new = False
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be written ({error.strerror}); what was committed is safe: "
                "make room and run the same command again"
            ) from error


def _next_name(journal: Place) -> str:
    taken = [path.stem[1:] for path in journal.glob("w*.jsonl")]
    last = max((int(number) for number in taken if number.isdecimal()), default=0)
    return f"w{last + 1:06d}"


class _Line(NamedTuple):
    """A whole line of a journal file."""

    text: bytes
    committed: list[Entry]
    dropped: list[Key]


def _lines(path: Place) -> Iterator[_Line | None]:
    """Yield the whole lines of a journal file, None for a damaged one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror})") from None
    *lines, _ = content.split(b"\n")  # what follows the last one was torn by a crash
    for text in lines:
        try:
            yield _parse(text + b"\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            yield None


def _parse(text: bytes) -> _Line:
    content = json.loads(text)
    if isinstance(content, list):
        return _Line(text, [_entry(fields) for fields in content], [])
    dropped = [(int(shard), str(array)) for shard, array in content["dropped"]]
    return _Line(text, [], dropped)


def _files(store: Place) -> list[Place]:
    return sorted((store / JOURNAL).glob("*.jsonl"))


def read_journal(store: Place) -> list[Entry]:
    """Return every file that any writer committed; of one written twice, the last.

    Raises:
        StoreError: a line is damaged.
    """
    for path in damaged_files(store):
        if path.stem == TEXT and not (store / TABLE).exists():
            raise StoreError(f"{path} has a damaged line; delete the store and harvest again")
        raise StoreError(
            f"{path} has a damaged line; lorsa store verify {store} --repair drops it, and the "
            "same lorsa harvest command redoes the shards that it told of"
        )
    return list(salvage_journal(store).values())


def damaged_files(store: Place) -> list[Place]:
    """Return the journal files in which a line cannot be read."""
    return [path for path in _files(store) if any(line is None for line in _lines(path))]


def salvage_journal(store: Place) -> dict[Key, Entry]:
    """Return what the journal tells, passing over lines that cannot be read."""
    found: dict[Key, Entry] = {}
    for path in _files(store):
        for line in _lines(path):
            if line is not None:
                found |= {(entry.shard, entry.array): entry for entry in line.committed}
                for key in line.dropped:
                    found.pop(key, None)
    return found


def rewrite_journal(path: Place) -> None:
    """Keep the lines of a journal file that can be read."""
    write_atomically(path, b"".join(line.text for line in _lines(path) if line is not None))


def write_table(store: Place, entries: Iterable[Entry]) -> None:
    """Write shards.parquet, with a checksum in every page."""
    rows = [entry._asdict() for entry in sorted(entries)]
    content = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), content, write_page_checksum=True)
    write_atomically(store / TABLE, content.getvalue().to_pybytes())


def read_table(store: Place) -> list[Entry]:
    """Read shards.parquet.

    Raises:
        StoreError: missing, damaged, of another schema, or with a row that cannot be one.
    """
    path = store / TABLE
    try:
        content = pa.BufferReader(path.read_bytes())
        table = pq.read_table(content, schema=_SCHEMA, page_checksum_verification=True)
        # a column that an older version did not write is null
        rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        return [_entry(row) for row in rows]
    except (OSError, pa.ArrowException, ValueError, TypeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"{path} cannot be read ({reason}); lorsa store verify {store} --repair makes it anew "
            "from the journal, or restore a copy"
        ) from None


class Lock:
    """One writer for a store at a time; the lock ends with its process, however that ends."""

    def __init__(self, store: Path) -> None:
        """Take the lock.

        Raises:
            StoreError: another process has it, or the store cannot be written.
        """
        try:
            (store / JOURNAL).mkdir(parents=True, exist_ok=True)
            self._file: Any = (store / JOURNAL / LOCK).open("w")
        except OSError as error:
            raise StoreError(
                f"{store} cannot be written ({error.strerror}), only read; make it writable, or "
                "copy it to another disk"
            ) from None
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

    def require_held(self) -> None:
        """Do nothing: while the process lives, nobody else gets the lock."""

    def release(self) -> None:
        """Let others write."""
        self._file.close()


def take_lock(store: Place) -> Lock | Lease:
    """Take the lock of a store; raises StoreError if another process has it."""
    if isinstance(store, BucketPath):
        return Lease(store, store / JOURNAL / LOCK)
    return Lock(store)
