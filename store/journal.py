"""Which files of a store are committed: the journal, and shards.parquet in the end.

The journal is a folder with files of JSON lines, each of one process, read in the order of their
names, which is the order in which they were begun. A line is written, and forced to the disk, after
the shard's files are: a line that is there tells of files that are whole. A line torn by a crash is
the last of its file and is passed over; its shard is written again. What is said of a file that was
spoken of before goes to a new journal file, after whatever other processes said.

    [{"shard": 0, "array": "layers/12/attn_in", "n_seq": 64, ...}, ...]     committed
    {"dropped": [[0, "layers/12/attn_in"], ...]}                            no longer
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StoreError
from .bucket import BucketPath
from .manifest import JOURNAL
from .places import Place, sync, write_atomically

TABLE = "shards.parquet"
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
    """Appends this process's commits to a file of its own."""

    def __init__(self, store: Place, name: str | None = None) -> None:
        """Choose a file; without a name, a new one, after all that are there when it is begun."""
        self._journal = store / JOURNAL
        self._path: Place | None = None if name is None else self._journal / f"{name}.jsonl"
        self._told = b""
        """In a bucket, the whole file."""
        if isinstance(self._path, BucketPath) and self._path.is_file():
            self._told = self._path.read_bytes()

    def commit(self, entries: Iterable[Entry]) -> None:
        """Record files that are on the disk, all of them in one line."""
        self._append([entry._asdict() for entry in entries])

    def drop(self, keys: Iterable[Key]) -> None:
        """Record that files are no longer to be counted on, all of them in one line."""
        self._append({"dropped": sorted(keys)})

    def begin_anew(self) -> None:
        """Write what follows to a new file: it is about files that others have spoken of."""
        self._path, self._told = None, b""

    def _append(self, content: Any) -> None:
        line = (json.dumps(content) + "\n").encode()
        try:
            self._path = self._path or _new_file(self._journal)
            if isinstance(self._path, BucketPath):  # nothing is appended to an object
                self._path.write_bytes(self._told + line)
                self._told += line
                return
            _append(self._path, line)
        except OSError as error:
            raise StoreError(
                f"{self._path or self._journal} cannot be written ({error.strerror}); what was "
                "committed is safe: make room and run the same command again"
            ) from error


def _append(path: Path, line: bytes) -> None:
    """Append a line to a file, whole or not at all, and force it to the disk."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # a torn line must not be the beginning of the next
            os.truncate(path, size)
        raise
    if size == 0:
        sync(path.parent)


def _new_file(journal: Place) -> Place:
    """Make a file after all others; of two processes at once, each gets its own."""
    while True:
        taken = [path.stem[1:] for path in journal.glob("w*.jsonl")]
        last = max((int(number) for number in taken if number.isdecimal()), default=0)
        path = journal / f"w{last + 1:06d}.jsonl"
        with suppress(FileExistsError):
            if isinstance(path, BucketPath):
                path.write_version(b"", None)
            else:
                path.open("xb").close()
            return path


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


@lru_cache(4096)  # a journal is read again and again while it grows
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
    require_readable(store)
    return list(salvage_journal(store).values())


def require_readable(store: Place) -> None:
    """Raise StoreError, with what to type, if a line of the journal is damaged."""
    for path in damaged_files(store):
        if path.stem == TEXT and not (store / TABLE).exists():
            raise StoreError(f"{path} has a damaged line; delete the store and harvest again")
        raise StoreError(
            f"{path} has a damaged line; lorsa store verify {store} --repair drops it, and the "
            "same lorsa harvest command redoes the shards that it told of"
        )


def damaged_files(store: Place) -> list[Place]:
    """Return the journal files in which a line cannot be read."""
    return [path for path in _files(store) if any(line is None for line in _lines(path))]


class Told(NamedTuple):
    """What a journal tells."""

    entries: dict[Key, Entry]
    """The committed files."""
    spoken_of: set[Key]
    """These and all that were once committed or dropped."""


def tell(store: Place) -> Told:
    """Return what the journal tells, passing over lines that cannot be read."""
    told = Told({}, set())
    for path in _files(store):
        for line in _lines(path):
            if line is not None:
                told.entries.update({(e.shard, e.array): e for e in line.committed})
                told.spoken_of.update((e.shard, e.array) for e in line.committed)
                told.spoken_of.update(line.dropped)
                for key in line.dropped:
                    told.entries.pop(key, None)
    return told


def salvage_journal(store: Place) -> dict[Key, Entry]:
    """Return its committed files alone."""
    return tell(store).entries


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
