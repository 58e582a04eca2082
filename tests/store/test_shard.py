"""One shard file: read back by us and by zarr, and never silently wrong."""

from pathlib import Path
from typing import Any

import google_crc32c.python
import numpy as np
import pytest
from lorsa.errors import StoreError
from lorsa.store.encoding import blosc
from lorsa.store.shard import ShardWriter, publish, read_checksum, read_chunk, read_index


def _write(path: Path, rows: Any, n_chunks: int, codec: Any = None) -> Any:
    writer = ShardWriter(path, n_chunks=n_chunks, codec=codec)
    for row in rows:
        writer.append(row[None])
    done = writer.commit()
    publish([path])
    return done


def _read(path: Path, n_chunks: int, shape: tuple[int, ...], row: int, codec: Any = None) -> Any:
    out = np.empty(shape, dtype=np.float32)
    with path.open("rb", buffering=0) as file:
        read_chunk(file.fileno(), path, read_index(path, n_chunks)[row], out, codec)
    return out


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_what_is_written_is_read(tmp_path: Path, compression: str) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    codec = blosc(compression, 4)
    done = _write(tmp_path / "s", rows, 8, codec)
    assert done.n_bytes == (tmp_path / "s").stat().st_size
    assert done.crc32c == read_checksum(tmp_path / "s", 8)
    for row in range(5):
        assert np.array_equal(_read(tmp_path / "s", 8, (7, 3), row, codec), rows[row])


def test_a_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    """Taken of all bytes it was that of any uncompressed shard of the same size."""
    rows = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    one, other = (_write(tmp_path / name, part, 4) for name, part in zip("ab", rows, strict=True))
    assert one.n_bytes == other.n_bytes
    assert one.crc32c != other.crc32c
    data = [(tmp_path / name).read_bytes() for name in "ab"]
    assert google_crc32c.value(data[0]) == google_crc32c.value(data[1])  # why it is not that


def test_a_checksum_is_taken_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 37)).astype(np.float32)
    done = _write(tmp_path / "s", rows, 6)
    for block_bytes in (1, 7, 152, 300, 10_000):
        monkeypatch.setattr("lorsa.store.places.BLOCK_BYTES", block_bytes)
        assert read_checksum(tmp_path / "s", 6) == done.crc32c


def test_checksums_without_a_compiled_package_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pure Python the package takes items for bytes."""
    rows = np.arange(40, dtype=np.float32).reshape(5, 8)
    compiled = _write(tmp_path / "a", rows, 6)
    for name in ("value", "extend"):
        monkeypatch.setattr(google_crc32c, name, getattr(google_crc32c.python, name))
    assert _write(tmp_path / "b", rows, 6) == compiled
    assert read_checksum(tmp_path / "a", 6) == compiled.crc32c
    assert np.array_equal(_read(tmp_path / "a", 6, (8,), 4), rows[4])


def test_a_chunk_of_fewer_bytes_raises(tmp_path: Path) -> None:
    """blosc filled the beginning of the array, and the rest was what memory held."""
    codec = blosc("lz4", 4)
    _write(tmp_path / "s", np.ones((1, 3), np.float32), 1, codec)
    with pytest.raises(StoreError, match="damaged .length at byte 0"):
        _read(tmp_path / "s", 1, (4,), 0, codec)


def test_a_chunk_that_was_never_written_raises(tmp_path: Path) -> None:
    """zarr itself would read zeros."""
    _write(tmp_path / "s", np.ones((2, 3), np.float32), 4)
    with pytest.raises(StoreError, match="lacks a sequence"):
        _read(tmp_path / "s", 4, (3,), 2)


def test_nothing_is_seen_before_the_commit(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", n_chunks=2)
    writer.append(np.ones((1, 3), np.float32))
    assert not (tmp_path / "s").exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    path = tmp_path / "s"
    _write(path, rows, 3)
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(StoreError, match=str(path)):
            for row in range(2):
                _read(path, 3, (5,), row)
        with pytest.raises(StoreError, match=str(path)):
            read_checksum(path, 3)


@pytest.mark.parametrize("keep", [0, 10, 50])
def test_a_cut_file_raises(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s"
    _write(path, np.ones((2, 5), np.float32), 3)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError):
        read_index(path, 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """/dev/full refuses every write, as a full disk does, the one at closing too."""
    (tmp_path / "s.partial").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path / "s", n_chunks=2)
    with pytest.raises(StoreError, match=r"No space left on device.*run the same command again"):
        for _ in range(9):
            writer.append(np.ones((1, 30_000), np.float32))
    writer.discard()
    assert not list(tmp_path.iterdir())
