"""Files and folders written whole or not at all, and a lock on folders.

A file or folder that is being written has a name that ends in .partial. When it is whole, it is
flushed to the disk and renamed, and the rename is flushed too. A reader sees all of it or what was
there before, also after a crash.
"""

import errno
import fcntl
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
READ_BYTES = 4 << 20


def partial_of(path: Path) -> Path:
    """Return the name of a file or folder while it is not whole."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to, which is renamed to path when the block ends.

    If the block raises, what it wrote is removed and what was at path stays. What a killed process
    left under the temporary name is removed first.

    Args:
        path: file, or folder that does not exist yet; its parent exists.

    Raises:
        OSError: the disk does not take it.
    """
    partial = partial_of(path)
    _remove(partial)
    try:
        yield partial
        if partial.is_dir():
            sync_tree(partial)
        else:
            sync(partial)
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise
    _sync_names(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file by `whole`; text in UTF-8."""
    with whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON by `whole`; see `json_text`."""
    write_whole(path, json_text(content))


def json_text(content: Any) -> str:
    """Return JSON indented by one space; see `finite`."""
    return json.dumps(finite(content), indent=1, allow_nan=False) + "\n"


def finite(content: Any) -> Any:
    """Return content with None for numbers that are not finite: JSON has no NaN and no infinity."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    """Flush a folder's names, where its file system can do that at all."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def sync_tree(root: Path) -> None:
    """Flush everything below a folder to the disk."""
    for folder, _, files in os.walk(root):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file's content, read in parts."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            value = zlib.crc32(part, value)
    return value


def lock_folder(folder: Path) -> int | None:
    """Lock a folder against other processes until `os.close` of the returned handle.

    The lock ends with its process, however that ends.

    Returns:
        A handle; None if another process has the lock.

    Raises:
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return handle


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):  # on a full disk, what it took is needed
        partial.unlink(missing_ok=True)
