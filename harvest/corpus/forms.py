"""Forms that a file comes in: its kind by suffix, compressed, in UTF-16, or a pointer."""

import io
import lzma
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import HarvestError
from .choices import (
    KNOWN_SUFFIXES,
    PACKED_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    suffix_of,
)
from .counts import Counts
from .encodings import wide_encoding

ARCHIVE_SUFFIXES = (
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".z", ".br", ".lzma", ".cab"),
)
PARTIAL_SUFFIXES = (
    *(".part", ".partial", ".incomplete", ".crdownload", ".download", ".filepart", ".aria2"),
)
"""Suffixes of files that a download has not finished."""
HEAD_BYTES = 4096
"""Bytes that a file's form is told from."""
_BEGINNINGS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
_POINTER = re.compile(
    rb"version https://(git-lfs|hawser)\.github\.com/spec/|(\.\./)*(\.git)?/annex/objects/"
)


class FileError(HarvestError):
    """File that has no documents, or cannot be read to its end."""

    def __init__(self, kind: str, message: str) -> None:
        """Take the kind that `Counts` counts the file as."""
        super().__init__(message)
        self.kind = kind


def require_data(file: Path) -> None:
    """Raise FileError if a file is a pointer, an empty table, or a table compressed as a whole."""
    with file.open("rb") as raw:
        head = raw.read(HEAD_BYTES)
    suffix = suffix_of(file)
    if _POINTER.match(head):
        raise FileError(
            "pointer_files",
            f"data {file}: is a pointer in place of its data: fetch it, as by git lfs pull or git "
            "annex get",
        )
    if not head and suffix in KNOWN_SUFFIXES and suffix not in TEXT_SUFFIXES:
        raise FileError("empty_files", f"data {file}: is empty; fetch or write it again")
    if suffix in TABLE_SUFFIXES and (compression := _compression(file, head)):
        raise FileError("archive_files", f"data {file}: is compressed by {compression}: unpack it")


def open_text(file: Path, name: str, counts: Counts, newline: str | None = None) -> Any:
    """Open text, compressed or not; invalid UTF-8 becomes surrogates.

    Args:
        file: file to open.
        name: its name in counts.
        counts: counts of what is changed, added to.
        newline: as of `io.TextIOWrapper`.
    """
    raw: Any = file.open("rb", buffering=1 << 20)
    compression = _compression(file, raw.peek(HEAD_BYTES)[:HEAD_BYTES])
    if compression == "xz":
        raw = io.BufferedReader(lzma.LZMAFile(raw))  # noqa: SIM115
    elif compression is not None:
        raw = io.BufferedReader(pa.input_stream(raw, compression=compression))
    if (encoding := wide_encoding(raw.peek(HEAD_BYTES)[:HEAD_BYTES])) is not None:
        counts.add("converted_files", name)
        return io.TextIOWrapper(raw, encoding, errors="replace", newline=newline)
    return io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline=newline)


def _compression(file: Path, head: bytes) -> str | None:
    """Return what a file is compressed by, told by its first bytes or else by its name."""
    for compression, beginning in _BEGINNINGS.items():
        if beginning.match(head):
            return compression
    return PACKED_SUFFIXES.get(file.suffix.lower())
