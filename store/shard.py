"""One shard file of a Zarr v3 array (codec sharding_indexed), a sequence at a time.

    chunk 0 | crc32c | chunk 1 | crc32c | ... | index | crc32c of the index

A chunk is one sequence, whole, compressed or not. The index holds offset and length of every chunk,
uint64 little-endian; 2^64 - 1 twice is a chunk beyond the end of the array.

zarr-python would hold a whole shard in memory to write it and reads chunk by chunk through Python
objects; here a shard grows on disk as sequences arrive, and a sequence is read by one positioned
read into the array that the caller gets. Every read is checked: a missing or damaged chunk raises.

Source: Zarr v3 specification, codecs sharding_indexed and crc32c.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np

from .bucket import BucketPath
from .encoding import Array
from .errors import StoreError
from .places import Place, read_tail, sync

NO_CHUNK = np.uint64(2**64 - 1)
CRC_BYTES = 4
ENTRY_BYTES = 16
FLUSH_BYTES = 64 << 20
"""Bytes of a growing file that may wait in the page cache."""
N_FOLDERS = 4
"""Folders from a shard file up to its array, which may be new."""
REMEDY = "lorsa store verify STORE --full --repair finds all damage and has it harvested again"


class ShardFile(NamedTuple):
    """A committed file, as the journal records it."""

    n_bytes: int
    crc32c: int
    """Of the whole file."""


class ShardWriter:
    """Append sequences to a new shard file; nobody sees the file before `commit`."""

    def __init__(
        self, path: Place, *, n_chunks: int, codec: Any = None, each: Callable[..., Any] = map
    ) -> None:
        """Start a file.

        Args:
            path: where the shard will lie.
            n_chunks: chunks that the index has room for.
            codec: numcodecs codec of a chunk's bytes, or None.
            each: `map`, or that of a pool of threads, which then encode the chunks.
        """
        self.path = path
        self._index = np.full((n_chunks, 2), NO_CHUNK, dtype="<u8")
        self._codec = codec
        self._each = each
        self._crc = 0
        self._offset = 0
        self._flushed = 0
        self._n_written = 0
        try:
            self._file = _open_draft(path)
        except OSError as error:
            raise _cannot_write(path, error) from None

    def append(self, chunks: Array) -> None:
        """Write the next chunks, [n, ...]; raises StoreError if the disk does not take them."""
        for data, crc in self._each(self._encode, chunks):
            start = self._offset
            self._write(data)
            self._write(crc)
            self._index[self._n_written] = start, self._offset - start
            self._n_written += 1
        self._flush_now_and_then()

    def _encode(self, chunk: Array) -> tuple[Any, bytes]:
        """Return a chunk's bytes and their checksum."""
        chunk = np.ascontiguousarray(chunk)
        data = chunk if self._codec is None else self._codec.encode(chunk)
        return data, google_crc32c.value(data).to_bytes(CRC_BYTES, "little")

    def _flush_now_and_then(self) -> None:
        """Let the disk work while the model does, not all at once at the end of the shard."""
        if self._offset - self._flushed < FLUSH_BYTES:
            return
        try:
            self._file.flush()
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        self._flushed = self._offset

    def commit(self) -> ShardFile:
        """Write the index, flush to the disk and put the file in its place."""
        index = self._index.tobytes()
        self._write(index)
        self._write(google_crc32c.value(index).to_bytes(CRC_BYTES, "little"))
        try:
            self._file.flush()
            if isinstance(self.path, BucketPath):
                self._file.seek(0)
                self.path.upload(self._file)
                self._file.close()
            else:
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(_partial(self.path), self.path)
                for folder in self.path.parents[:N_FOLDERS]:
                    sync(folder)
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        return ShardFile(self._offset, self._crc)

    def discard(self) -> None:
        """Remove what was written."""
        with suppress(OSError):  # a full disk refuses the last bytes once more
            self._file.close()
        if isinstance(self.path, Path):
            _partial(self.path).unlink(missing_ok=True)

    def _write(self, data: Any) -> None:
        try:
            self._offset += self._file.write(data)
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        self._crc = google_crc32c.extend(self._crc, data)


def _open_draft(path: Place) -> IO[bytes]:
    """Open what a shard grows in: a file beside it, or a nameless one in TMPDIR for a bucket."""
    if isinstance(path, BucketPath):
        return tempfile.TemporaryFile()
    path.parent.mkdir(parents=True, exist_ok=True)
    return _partial(path).open("wb")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _cannot_write(path: Place, error: OSError) -> StoreError:
    where = f" in {tempfile.gettempdir()}, see TMPDIR" if isinstance(path, BucketPath) else ""
    return StoreError(
        f"{path} cannot be written ({error.strerror}{where}); what was committed is safe: "
        "make room and run the same command again"
    )


def read_index(path: Place, n_chunks: int) -> Array:
    """Return offset and length of every chunk, uint64 [n_chunks, 2].

    Raises:
        StoreError: the file is missing, too short or its index is damaged.
    """
    size = n_chunks * ENTRY_BYTES
    try:
        data = read_tail(path, size + CRC_BYTES)
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from None
    if google_crc32c.value(data[:size]).to_bytes(CRC_BYTES, "little") != data[size:]:
        raise StoreError(f"{path} is damaged (checksum of its index); {REMEDY}")
    return np.frombuffer(data[:size], dtype="<u8").reshape(n_chunks, 2)


def read_chunk(
    handle: int | BucketPath, path: Place, entry: Array, out: Array, codec: Any = None
) -> None:
    """Read one chunk and its checksum into an array, by one positioned read, and compare them.

    Args:
        handle: open file descriptor of the shard, or its place in a bucket.
        path: of the file, for messages.
        entry: offset and length, from `read_index`.
        out: contiguous array of the chunk's shape and disk dtype, filled here.
        codec: as the chunk was written.

    Raises:
        StoreError: the chunk was never written, is cut short, or its checksum does not match.
    """
    offset, length = int(entry[0]), int(entry[1])
    if entry[0] == NO_CHUNK:
        raise StoreError(f"{path} lacks a sequence; {REMEDY}")
    if length < CRC_BYTES or (codec is None and out.nbytes + CRC_BYTES != length):
        raise StoreError(f"{path} is damaged (length at byte {offset}); {REMEDY}")
    data = out if codec is None else np.empty(length - CRC_BYTES, dtype=np.uint8)
    crc = bytearray(CRC_BYTES)
    _read_exactly(handle, path, offset, data.reshape(-1).view(np.uint8).data, memoryview(crc))
    if google_crc32c.value(data) != int.from_bytes(crc, "little"):
        raise StoreError(f"{path} is damaged (checksum at byte {offset}); {REMEDY}")
    if codec is not None:
        try:
            codec.decode(data, out=out)
        except (RuntimeError, ValueError) as error:  # its checksum holds: another shape or codec
            raise StoreError(f"{path} is damaged ({error} at byte {offset}); {REMEDY}") from None


def _read_exactly(handle: int | BucketPath, path: Place, offset: int, *parts: memoryview) -> None:
    """Fill buffers from a file; a read may stop short on network disks and above 2 GB."""
    left = list(parts)
    while left:
        if isinstance(handle, BucketPath):
            n_read = handle.preadv(left, offset)
        else:
            n_read = os.preadv(handle, left, offset)
        if n_read == 0:
            missing = offset + sum(len(part) for part in left)
            raise StoreError(f"{path} ends before byte {missing}; {REMEDY}")
        offset += n_read
        while left and n_read >= len(left[0]):
            n_read -= len(left.pop(0))
        if left:
            left[0] = left[0][n_read:]
