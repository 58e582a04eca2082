"""Which files of a store are committed, as its writers tell it one after the other.

The journal is a folder with files of JSON lines, each of one process, read in the order of their
names, which is the order in which they were begun. A line is written, and forced to the disk, after
the shard's files are: a line that is there tells of files that are whole. A line torn by a crash is
the last of its file and is passed over; its shard is written again. What is said of a file that was
spoken of before goes to a journal file that comes after whatever was said.

    [{"shard": 0, "array": "layers/12/attn_in", "n_seq": 64, ...}, ...]     committed
    {"dropped": [[0, "layers/12/attn_in"], ...]}                            no longer

A journal is read again and again while it grows, each time from where it was left.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import StoreError
from .bucket import BucketPath
from .entries import TABLE, Entries, Entry, Key, entry_of, key_of
from .manifest import JOURNAL
from .places import Place, files_in, read_from, sync, write_atomically

TEXT = "text"
"""Name of the journal file that tells of tokens and documents."""
OBJECT_BYTES = 1 << 20
"""Of a journal file in a bucket, which is put anew for every line: then another is begun."""
TAIL_BYTES = 256
"""Of what was read of a file, compared before reading on: an entry with its shard and checksum. If
they are others, a line was taken back or the file is another by now."""


class JournalWriter:
    """Appends this process's commits to a file of its own."""

    def __init__(self, store: Place, name: str | None = None) -> None:
        """Choose a file; without a name, a new one, after all that are there when it is begun."""
        self._journal = store / JOURNAL
        self._is_named = name is not None
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

    def come_after(self, name: str) -> None:
        """Write what follows to a new file, unless ours comes after one that has a word on it."""
        if self._path is not None and self._path.name < name:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._path, self._told = None, b""

    def _append(self, content: Any) -> None:
        line = (json.dumps(content) + "\n").encode()
        try:
            if self._told and not self._is_named and len(self._told + line) > OBJECT_BYTES:
                self._begin_anew()
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
    """What a whole line says."""

    committed: list[Entry]
    dropped: list[Key]


def _parse(text: bytes) -> _Line | None:
    """Return what a line says, None if it is damaged."""
    try:
        content = json.loads(text)
        if isinstance(content, list):
            return _Line([entry_of(fields) for fields in content], [])
        return _Line([], [key_of(*key) for key in content["dropped"]])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


class _Left(NamedTuple):
    """Where the reading of a file was left."""

    n_bytes: int = 0
    """Of whole lines."""
    tail: bytes = b""
    """The last of these bytes."""

    def after(self, line: bytes) -> "_Left":
        """Return the same behind one more line."""
        return _Left(self.n_bytes + len(line), (self.tail + line)[-TAIL_BYTES:])


class Journal:
    """What the journal of a store tells, as far as it was read."""

    def __init__(self, store: Place) -> None:
        """Read it."""
        self._store = store
        self._forget()
        self.read()

    def _forget(self) -> None:
        self.entries = Entries()
        """The committed files."""
        self.damaged: list[Place] = []
        """Journal files in which a line cannot be read; such lines are passed over."""
        self._left: dict[Place, _Left] = {}

    def read(self) -> set[int]:
        """Read on from where it was left; return the shards of which more is known now.

        Raises:
            StoreError: a file cannot be read.
        """
        try:
            found = self._read_on()
            if found is not None:
                return found
            before = self.entries.shards
            self._forget()
            return before | (self._read_on() or set())
        except OSError as error:
            raise StoreError(
                f"{error.filename or self._store / JOURNAL} cannot be read ({error.strerror})"
            ) from None

    def _read_on(self) -> set[int] | None:
        """Read what was added; None if what was read is no longer there as it was."""
        files = _files(self._store)
        if list(files)[: len(self._left)] != list(self._left):
            return None
        found: set[int] = set()
        for rank, (path, size) in enumerate(files.items()):
            left = self._left.setdefault(path, _Left())
            if size is not None and size == left.n_bytes:
                continue
            blocks = read_from(path, left.n_bytes - len(left.tail))
            first = next(blocks, b"")
            if not first.startswith(left.tail):
                return None
            for line in _whole_lines(chain([first[len(left.tail) :]], blocks)):
                found |= self._take_in(line, path, rank)
                self._left[path] = left = left.after(line)
        return found

    def _take_in(self, text: bytes, path: Place, rank: int) -> set[int]:
        line = _parse(text)
        if line is None:
            self.damaged += [path] if path not in self.damaged else []
            return set()
        self.entries.put(line.committed, rank)
        self.entries.drop(line.dropped, rank)
        return {e.shard for e in line.committed} | {shard for shard, _ in line.dropped}

    def last_mention(self, keys: Iterable[Key]) -> str | None:
        """Return the name of the journal file with the last word on some files, None if none has.

        That word may be that they are dropped.
        """
        rank = self.entries.last_rank(keys)
        return None if rank is None else list(self._left)[rank].name

    def require_readable(self) -> None:
        """Raise StoreError, with what to type, if a line is damaged."""
        for path in self.damaged:
            if path.stem == TEXT and not (self._store / TABLE).exists():
                raise StoreError(f"{path} has a damaged line; delete the store and harvest again")
            raise StoreError(
                f"{path} has a damaged line; lorsa store verify {self._store} --repair drops it, "
                "and the same lorsa harvest command redoes the shards that it told of"
            )


def _files(store: Place) -> dict[Place, int | None]:
    """Return the journal files in order, with their bytes where listing them tells that."""
    return dict(sorted(files_in(store / JOURNAL, "*.jsonl").items()))


def _whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines with their ends; what follows the last one was torn by a crash."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"


def read_journal(store: Place) -> Entries:
    """Return every file that any writer committed; of one written twice, the last.

    Raises:
        StoreError: a line is damaged.
    """
    journal = Journal(store)
    journal.require_readable()
    return journal.entries


def rewrite_journal(path: Place) -> None:
    """Keep the lines of a journal file that can be read."""
    lines = _whole_lines(read_from(path, 0))
    write_atomically(path, b"".join(line for line in lines if _parse(line) is not None))
