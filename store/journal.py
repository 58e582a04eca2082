"""The journal of a store: which files are committed, as its writers recorded them.

It is a folder of files of JSON lines. Each file is one process's; they are read in the order of
their names, which is the order in which they were created. A line is written and flushed after the
files of its shard, so a line lists files that are whole. A line torn by a crash is the last of its
file and is skipped; its shard is written again. A new mention of a file goes to a journal file that
sorts after all earlier mentions of it.

    {"committed": [{"shard": 0, "array": "layers/12/attn_in", ...}, ...], "crc32c": "0a1b2c3d"}
    {"dropped": [[0, "layers/12/attn_in"], ...], "crc32c": "0a1b2c3d"}      no longer committed

The checksum is that of the line before it. Version 0.1.0 wrote none, and a line of committed files
as their list alone.

A journal is read while it grows; each read continues where the one before ended.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AGAIN, StoreError, UnreachableError, reason_of, remedy_of
from ..seal import crc32c, hexadecimal
from .bucket import BucketPath
from .entries import Entries, Entry, Key, entry_of, key_of
from .manifest import JOURNAL
from .places import Place, files_in, read_from, sync, write_atomically

_SEAL = b', "crc32c": "%s"}'
"""End of a line."""
TEXT = "text"
"""Name of the journal file that lists the files of tokens and documents."""
OBJECT_BYTES = 1 << 20
"""Largest size of a journal file in a bucket, which is put again for every line."""
TAIL_BYTES = 256
"""Bytes before the end of the last read that are compared before the next: an entry with its shard
and checksum. If they differ, a line was taken back or the file is another one."""


class JournalWriter:
    """Appends the commits of this process to a journal file of its own."""

    def __init__(self, store: Place, name: str | None = None) -> None:
        """Choose a file; without a name, a new one, created to sort last with its first line."""
        self._journal = store / JOURNAL
        self._is_named = name is not None
        self._path: Place | None = None if name is None else self._journal / f"{name}.jsonl"
        self._content = b""
        """Content of the whole file, in a bucket; empty on a disk."""
        if isinstance(self._path, BucketPath) and self._path.is_file():
            self._content = self._path.read_bytes()

    def commit(self, entries: Iterable[Entry]) -> None:
        """Record files that are on the disk, all of them in one line."""
        self._append({"committed": [entry._asdict() for entry in entries]})

    def drop(self, keys: Iterable[Key]) -> None:
        """Record that files are no longer committed, all of them in one line."""
        self._append({"dropped": sorted(keys)})

    def come_after(self, name: str) -> None:
        """Begin a new file for what follows, unless the current one sorts after the named one."""
        if self._path is not None and self._path.name < name:
            self._begin_another()

    def _begin_another(self) -> None:
        self._path, self._content = None, b""

    def _append(self, content: Any) -> None:
        body = json.dumps(content).encode()[:-1]
        line = body + _SEAL % hexadecimal(crc32c(body)).encode() + b"\n"
        try:
            if self._content and not self._is_named and len(self._content + line) > OBJECT_BYTES:
                self._begin_another()
            self._path = self._path or _new_file(self._journal)
            if isinstance(self._path, BucketPath):  # nothing is appended to an object
                self._path.write_bytes(self._content + line)
                self._content += line
                return
            _append(self._path, line)
        except OSError as error:
            raise StoreError(
                f"{self._path or self._journal} cannot be written ({error.strerror}); what was "
                f"committed is safe: {remedy_of(error) or AGAIN}"
            ) from error


def _append(path: Path, line: bytes) -> None:
    """Append a line to a file, whole or not at all, and flush it to the disk."""
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
    """Create a file that sorts after all others; two processes at once get two files."""
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
    """Content of a line that is whole."""

    committed: list[Entry]
    dropped: list[Key]


def _parse(text: bytes) -> _Line | None:
    """Return the content of a line, None if it is damaged."""
    try:
        content = json.loads(text)
        if isinstance(content, list):
            content = {"committed": content}
        elif "crc32c" in content:
            body = text.rstrip(b"\n")[: -len(_SEAL % (b"0" * 8))]
            if not text.startswith(body + _SEAL % hexadecimal(crc32c(body)).encode()):
                return None
            del content["crc32c"]
        ((what, listed),) = content.items()
        if what == "committed":
            return _Line([entry_of(fields) for fields in listed], [])
        return _Line([], [key_of(*key) for key in listed]) if what == "dropped" else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, AttributeError):
        return None


class _Position(NamedTuple):
    """End of what was read of a file."""

    n_bytes: int = 0
    """Bytes of the whole lines that were read"""
    tail: bytes = b""
    """Last of these bytes, at most TAIL_BYTES"""

    def after(self, line: bytes) -> "_Position":
        """Return the position after one more line."""
        return _Position(self.n_bytes + len(line), (self.tail + line)[-TAIL_BYTES:])


class Journal:
    """Committed files of a store by its journal, as far as it was read."""

    def __init__(self, store: Place) -> None:
        """Read the journal of a store."""
        self._store = store
        self._reset()
        self.read()

    def _reset(self) -> None:
        self.entries = Entries()
        """Files that are committed, and those that were dropped."""
        self.damaged: list[Place] = []
        """Journal files with a line that cannot be read; such lines are skipped."""
        self._positions: dict[Place, _Position] = {}

    def read(self) -> set[int]:
        """Read the lines that were added; return the shards that they mention.

        Raises:
            StoreError: a file cannot be read.
        """
        try:
            found = self._read_on()
            if found is not None:
                return found
            before = self.entries.shards
            self._reset()
            return before | (self._read_on() or set())
        except (OSError, MemoryError) as error:
            where = getattr(error, "filename", None) or self._store / JOURNAL
            remedy = remedy_of(error)
            kind = StoreError if remedy is None else UnreachableError
            told = f"{where} cannot be read ({reason_of(error)})"
            raise kind(f"{told}; {remedy}" if remedy else told) from None

    def _read_on(self) -> set[int] | None:
        """Read the lines that were added; None if what was read before has changed."""
        files = _files(self._store)
        if list(files)[: len(self._positions)] != list(self._positions):
            return None
        found: set[int] = set()
        for rank, (path, size) in enumerate(files.items()):
            position = self._positions.setdefault(path, _Position())
            if size is not None and size == position.n_bytes:
                continue
            blocks = read_from(path, position.n_bytes - len(position.tail))
            first = next(blocks, b"")
            if not first.startswith(position.tail):
                return None
            for line in _whole_lines(chain([first[len(position.tail) :]], blocks)):
                found |= self._apply(line, path, rank)
                self._positions[path] = position = position.after(line)
        return found

    def _apply(self, text: bytes, path: Place, rank: int) -> set[int]:
        line = _parse(text)
        if line is None:
            self.damaged += [path] if path not in self.damaged else []
            return set()
        self.entries.put(line.committed, rank)
        self.entries.drop(line.dropped, rank)
        return {e.shard for e in line.committed} | {shard for shard, _ in line.dropped}

    def last_mention(self, keys: Iterable[Key]) -> str | None:
        """Return the name of the last journal file that mentions some files, None if none does.

        They may be mentioned as dropped.
        """
        rank = self.entries.last_rank(keys)
        return None if rank is None else list(self._positions)[rank].name

    def require_readable(self) -> None:
        """Raise StoreError, with what to type, if a line is damaged."""
        for path in self.damaged:
            raise StoreError(
                f"{path} has a damaged line; lorsa store verify {self._store} --repair lists again "
                "what it listed"
            )


def _files(store: Place) -> dict[Place, int | None]:
    """Return the journal files in order, with their bytes where a listing includes them."""
    return dict(sorted(files_in(store / JOURNAL, "*.jsonl").items()))


def _whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines with their ends; bytes after the last one were torn by a crash."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"


def read_journal(store: Place) -> Entries:
    """Return the committed files of all writers; for a file written twice, the last entry.

    Raises:
        StoreError: a line is damaged.
    """
    journal = Journal(store)
    journal.require_readable()
    return journal.entries


def rewrite_journal(path: Place) -> None:
    """Rewrite a journal file without the lines that cannot be read."""
    lines = _whole_lines(read_from(path, 0))
    write_atomically(path, b"".join(line for line in lines if _parse(line) is not None))
