"""Shard files of Zarr v3 arrays (codec sharding_indexed), a sequence at a time.

    chunk 0 | crc32c | chunk 1 | crc32c | ... | index | crc32c of the index

A chunk is one sequence, compressed or not. The index holds offset and length of every chunk, uint64
little-endian; 2^64 - 1 twice is a chunk beyond the end of the array.

zarr-python holds a whole shard in memory to write it, and reads chunk by chunk through Python
objects. Here a shard grows on disk as sequences arrive, and a sequence is read by one positioned
read into the array that the caller gets. Every read is checked: a missing or damaged chunk raises.

The checksum of a file, in the journal, is the crc32c of its chunks' checksums and its index. The
crc32c of all its bytes would be the same for any content: after data and its own crc32c, the state
of a crc depends on the length alone.

Source: Zarr v3 specification, codecs sharding_indexed and crc32c.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np

from ..errors import AGAIN, DamageError, StoreError, remedy_of
from .arrays import DiskArray
from .bucket import BucketPath
from .open_files import or_let_go
from .places import Place, read_blocks, read_tail, sync

NO_CHUNK = np.uint64(2**64 - 1)
CRC_BYTES = 4
ENTRY_BYTES = 16
FLUSH_BYTES = 64 << 20
"""Bytes of a growing file that may wait in the page cache."""
N_FOLDERS = 4
"""Folders from a shard file up to its array, which may be new and are flushed."""
LARGER_BYTES = 4096
"""Bytes that a compressed chunk may have more than its values; blosc adds a header of 16."""
BLOSC_SIZE = slice(4, 8)
"""Bytes of a blosc chunk that hold its decoded size, little-endian."""


class ShardFile(NamedTuple):
    """Size and checksum of a file, as the journal records them."""

    n_bytes: int
    crc32c: int
    """crc32c of the chunks' checksums and the index"""


class ShardWriter:
    """Appends sequences to a new shard file, which `commit` ends and `publish` makes visible."""

    def __init__(
        self, path: Place, *, n_chunks: int, codec: Any = None, each: Callable[..., Any] = map
    ) -> None:
        """Start a file.

        Args:
            path: place of the shard.
            n_chunks: chunks that the index has room for.
            codec: numcodecs codec of a chunk's bytes, or None.
            each: `map`, or the `map` of a pool of threads that encode the chunks.
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

    def append(self, chunks: DiskArray) -> None:
        """Write the next chunks, [n, ...]; raises StoreError if the disk does not take them."""
        for data, crc in self._each(self._encode, chunks):
            start = self._offset
            self._write(data)
            self._write(crc)
            self._crc = google_crc32c.extend(self._crc, crc)
            self._index[self._n_written] = start, self._offset - start
            self._n_written += 1
        self._flush_in_parts()

    def _encode(self, chunk: DiskArray) -> tuple[Any, bytes]:
        """Return a chunk's bytes and their checksum."""
        chunk = np.ascontiguousarray(chunk)
        data = chunk if self._codec is None else self._codec.encode(chunk)
        return data, _crc_bytes(data)

    def _flush_in_parts(self) -> None:
        """Flush every FLUSH_BYTES, so that the disk works while the shard grows."""
        if self._offset - self._flushed < FLUSH_BYTES:
            return
        try:
            self._file.flush()
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        self._flushed = self._offset

    def commit(self) -> ShardFile:
        """Write the index and flush the file to the disk; in a bucket it is visible then."""
        index = self._index.tobytes()
        self._write(index)
        self._write(_crc_bytes(index))
        try:
            self._file.flush()
            if isinstance(self.path, BucketPath):
                self._file.seek(0)
                self.path.upload(self._file)
                self._file.close()
            else:
                os.fsync(self._file.fileno())
                self._file.close()
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        return ShardFile(self._offset, google_crc32c.extend(self._crc, index))

    def discard(self) -> None:
        """Remove the file that was begun."""
        with suppress(OSError):  # a full disk refuses the last bytes once more
            self._file.close()
        if isinstance(self.path, Path):
            _partial(self.path).unlink(missing_ok=True)

    def _write(self, data: Any) -> None:
        try:
            self._offset += self._file.write(data)
        except OSError as error:
            raise _cannot_write(self.path, error) from None


def publish(paths: Iterable[Place]) -> None:
    """Rename files that were committed to their places, then flush the folders, each once.

    A folder's flush ends a transaction of the file system, and with it all renames before.

    Raises:
        StoreError: the disk does not take them.
    """
    local = [path for path in paths if isinstance(path, Path)]
    folders = dict.fromkeys(folder for path in local for folder in path.parents[:N_FOLDERS])
    path = None
    try:
        for path in local:
            os.replace(_partial(path), path)
        for path in folders:
            sync(path)
    except OSError as error:
        assert path is not None
        raise _cannot_write(path, error) from None


def _crc_bytes(data: Any) -> bytes:
    """Return the crc32c of a buffer, as bytes: the pure Python package fails on wider items."""
    crc: int = google_crc32c.value(np.frombuffer(data, np.uint8))
    return crc.to_bytes(CRC_BYTES, "little")


def _open_draft(path: Place) -> IO[bytes]:
    """Open the file in which a shard grows: beside it, or in TMPDIR for a bucket."""
    if isinstance(path, BucketPath):
        return or_let_go(tempfile.TemporaryFile)
    path.parent.mkdir(parents=True, exist_ok=True)
    return or_let_go(lambda: _partial(path).open("wb"))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _cannot_write(path: Place, error: OSError) -> StoreError:
    where = f" in {tempfile.gettempdir()}, see TMPDIR" if isinstance(path, BucketPath) else ""
    return StoreError(
        f"{path} cannot be written ({error.strerror}{where}); what was committed is safe: "
        f"{remedy_of(error) or AGAIN}"
    )


def read_index(path: Place, n_chunks: int) -> DiskArray:
    """Return offset and length of every chunk, uint64 [n_chunks, 2].

    Raises:
        DamageError: the file is too short or its index is damaged.
        OSError: it cannot be read.
    """
    size = n_chunks * ENTRY_BYTES
    data = read_tail(path, size + CRC_BYTES)
    if _crc_bytes(data[:size]) != data[size:]:
        raise DamageError(f"{path} is damaged (checksum of its index)")
    return np.frombuffer(data[:size], dtype="<u8").reshape(n_chunks, 2)


def read_chunk(
    handle: int | BucketPath, path: Place, entry: DiskArray, out: DiskArray, codec: Any = None
) -> None:
    """Read one chunk and its checksum into an array, by one positioned read, and compare them.

    Args:
        handle: open file descriptor of the shard, or its place in a bucket.
        path: place of the file, for messages.
        entry: offset and length, from `read_index`.
        out: contiguous array of the chunk's shape and disk dtype, filled here.
        codec: numcodecs codec by which the chunk was written, or None.

    Raises:
        DamageError: the chunk was never written, is cut short, of another length, or its checksum
            does not match.
        OSError: it cannot be read.
    """
    offset, length = int(entry[0]), int(entry[1])
    if entry[0] == NO_CHUNK:
        raise DamageError(f"{path} lacks a sequence")
    if length < CRC_BYTES or (codec is None and out.nbytes + CRC_BYTES != length):
        raise DamageError(f"{path} is damaged (length at byte {offset})")
    if codec is not None and length > out.nbytes + LARGER_BYTES + CRC_BYTES:
        raise DamageError(f"{path} is damaged (length at byte {offset})")
    data = out if codec is None else np.empty(length - CRC_BYTES, dtype=np.uint8)
    crc = bytearray(CRC_BYTES)
    _read_exactly(handle, path, offset, data.reshape(-1).view(np.uint8).data, memoryview(crc))
    if _crc_bytes(data) != crc:
        raise DamageError(f"{path} is damaged (checksum at byte {offset})")
    if codec is not None:
        if (
            int.from_bytes(data[BLOSC_SIZE], "little") != out.nbytes
        ):  # fewer would leave some of out
            raise DamageError(f"{path} is damaged (length at byte {offset})")
        try:
            codec.decode(data, out=out)
        except (RuntimeError, ValueError) as error:  # its checksum holds: another shape or codec
            raise DamageError(f"{path} is damaged ({error} at byte {offset})") from None


def read_checksum(path: Place, n_chunks: int) -> int:
    """Read a whole file, compare every chunk with its checksum, and return the file's checksum.

    Raises:
        DamageError: a chunk or the index is damaged, or something lies between them.
        OSError: it cannot be read.
    """
    index = read_index(path, n_chunks)
    chunks = index[index[:, 0] != NO_CHUNK].tolist()
    lengths: list[int] = []
    end = 0
    for offset, length in chunks:
        if offset != end or length < CRC_BYTES:
            raise DamageError(f"{path} is damaged (its index, of byte {offset})")
        lengths += [length - CRC_BYTES, CRC_BYTES]
        end += length
    found = _crcs(path, read_blocks(path), lengths)
    crcs = b""
    for offset, _ in chunks:
        own = next(found).to_bytes(CRC_BYTES, "little")
        if next(found) != google_crc32c.value(own):  # of 4 bytes no two have the same crc32c
            raise DamageError(f"{path} is damaged (checksum at byte {offset})")
        crcs += own
    crc: int = google_crc32c.value(crcs + index.tobytes())
    return crc


def _crcs(path: Place, blocks: Iterator[Any], lengths: Iterable[int]) -> Iterator[int]:
    """Yield the crc32c of consecutive runs of bytes, given their lengths."""
    block: Any = b""
    for left in lengths:
        crc = 0
        while left > 0:
            if not len(block) and (block := next(blocks, None)) is None:
                raise DamageError(f"{path} ends before its index")
            part, block = block[:left], block[left:]
            crc = google_crc32c.extend(crc, part)
            left -= len(part)
        yield crc


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
            raise DamageError(f"{path} ends before byte {missing}")
        offset += n_read
        while left and n_read >= len(left[0]):
            n_read -= len(left.pop(0))
        if left:
            left[0] = left[0][n_read:]
