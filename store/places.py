"""Places of stores, a folder or s3://bucket/folder, and all that differs between the two.

A `Place` is a `Path` or a `BucketPath`, which have the same methods for names and whole files. On a
disk a file is made atomic by flush and rename; in a bucket every object is.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .. import whole
from ..errors import StoreError, UnreachableError, reason_of, remedy_of
from ..reading import parse_json
from ..reading import read_json as read_json_file
from .bucket import BucketPath

Place = Path | BucketPath
BLOCK_BYTES = 4 << 20
"""Bytes of a block of a file that is read through and not kept."""


def place(where: str | Place) -> Place:
    """Return the place for what a user writes: a folder, or s3://bucket/folder.

    Raises:
        StoreError: a URL of another kind, or of no folder; obstore is not installed.
    """
    if isinstance(where, BucketPath):
        return where
    text = str(where)
    if text.startswith("s3:/"):
        return BucketPath.parse(text)
    if "://" in text:
        raise StoreError(f"{where} is no place for a store; use a folder or s3://BUCKET/FOLDER")
    return Path(where)


def write_atomically(path: Place, content: str | bytes) -> None:
    """Write a file so that a reader, now or after a crash, sees all of it or none."""
    data = content.encode() if isinstance(content, str) else content
    if isinstance(path, BucketPath):
        path.write_bytes(data)
        return
    whole.write_whole(path, data)


def sync(path: Place) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    if isinstance(path, BucketPath):
        return  # a bucket has flushed what it has accepted
    whole.sync(path)


def unmade_folders(folder: Place) -> list[Path]:
    """Return the folder and its parents that do not exist yet; none for a bucket."""
    if isinstance(folder, BucketPath):
        return []
    path = folder.absolute()
    return [each for each in (path, *path.parents) if not each.exists()]


def sync_tree(root: Place) -> None:
    """Flush everything below a folder to the disk."""
    if isinstance(root, BucketPath):
        return
    whole.sync_tree(root)


def remove_tree(folder: Place) -> None:
    """Delete a folder with all that is in it."""
    if isinstance(folder, BucketPath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder)


def leads_out(path: Place, root: Place) -> bool:
    """Return whether links lead from a path out of a store; a bucket has no links."""
    if isinstance(path, BucketPath) or isinstance(root, BucketPath):
        return False
    return not path.resolve().is_relative_to(root.resolve())


def tree_bytes(folder: Place) -> int:
    """Return the bytes of all files below a folder, 0 if there is none; it may be changing."""
    if isinstance(folder, BucketPath):
        return sum(folder.sizes().values())
    return sum(file_size(path) or 0 for path in folder.rglob("*"))


def free_disk_bytes(folder: Place) -> int | None:
    """Return the free bytes on the disk of a folder, which need not exist; None for a bucket."""
    if isinstance(folder, BucketPath):
        return None
    path = folder.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def file_size(path: Place) -> int | None:
    """Return the size of a file in bytes, None if there is none."""
    if isinstance(path, BucketPath):
        return path.size()
    return _size(path)


def file_sizes(root: Place) -> Callable[[str], int | None]:
    """Return a function from a name in a store to the file's size; a bucket is listed once."""
    if isinstance(root, BucketPath):
        return root.sizes_by_name().get
    folder = str(root)

    return lambda name: _size(f"{folder}/{name}")


def _size(path: str | Path) -> int | None:
    """Return the size of a file on a disk; what cannot be looked at is not called missing."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        remedy = remedy_of(error)
        if remedy is None:
            return None
        raise UnreachableError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def files_in(folder: Place, pattern: str) -> dict[Place, int | None]:
    """Return the files of a folder whose names match a pattern; in a bucket, with their bytes."""
    if isinstance(folder, BucketPath):
        return {path: n for path, n in folder.files().items() if fnmatch(path.name, pattern)}
    return dict.fromkeys(folder.glob(pattern))


def read_json(path: Place, *, constant: Callable[[str], Any] | None = None) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        UnreachableError: this machine failed, and nothing is known of the file.
        OSError, ValueError: it is missing, or no such JSON as ours.
    """
    with reading(path):
        if isinstance(path, BucketPath):
            return parse_json(path.read_bytes(), constant=constant)
        return read_json_file(path, constant=constant)


@contextmanager
def reading(path: Place) -> Iterator[None]:
    """Raise UnreachableError where this machine fails in the block, which reads a file.

    Other errors stay: by them, the file is missing or damaged.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if (remedy := remedy_of(error)) is None:
            raise
        raise UnreachableError(f"{path} cannot be read ({reason_of(error)}); {remedy}") from error


def read_tail(path: Place, n_bytes: int) -> bytes:
    """Return the last bytes of a file; all of them if it is shorter."""
    if isinstance(path, BucketPath):
        return path.read_tail(n_bytes)
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - n_bytes, 0))
        return file.read()


def read_from(path: Place, start: int) -> Iterator[bytes]:
    """Yield the bytes of a file from an offset on, block by block."""
    if isinstance(path, BucketPath):
        yield path.read_from(start)
        return
    with path.open("rb") as file:  # over NFS, opening a file shows what others have written
        file.seek(start)
        while block := file.read(BLOCK_BYTES):
            yield block


def read_blocks(path: Place) -> Iterator[Any]:
    """Yield the bytes of a file block by block; a block is valid until the next is asked for."""
    if isinstance(path, BucketPath):
        yield from path.read_blocks()
        return
    import numpy as np  # here, so that a config with a place imports none

    block = np.empty(BLOCK_BYTES, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        while n_read := file.readinto(block.data):
            yield block[:n_read]
