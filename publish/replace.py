"""Folders replaced as one: a reader sees all of the old one or all of the new one."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..whole import PARTIAL, partial_of, sync, sync_tree

AT_FDCWD = -100
ASIDE = f".old{PARTIAL}"
"""Suffix of a folder that was put aside for another."""
SWAP = 2
"""RENAME_EXCHANGE of Linux, and RENAME_SWAP of macOS."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a folder to write to, which takes the place of path when the block ends.

    It has a copy of all that path has, hard links where the disk has them: files in it are to be
    removed or renamed over, never written into. If the block raises, path stays as it was. What a
    killed process left is put back or removed.

    Args:
        path: folder, there or not; its parent exists. One process at a time writes it.

    Raises:
        OSError: the disk does not take it.
    """
    path = path.resolve()
    partial, old = partial_of(path), path.with_name(path.name + ASIDE)
    put_back(path)
    for stale in (partial, old):
        if stale.exists():
            shutil.rmtree(stale)
    try:
        if path.exists():
            shutil.copytree(path, partial, symlinks=True, copy_function=_link)
        else:
            partial.mkdir()
        yield partial
        sync_tree(partial)
        if not path.exists():
            os.replace(partial, path)
        elif not _exchange(partial, path):  # there is no folder for a moment, but never half of one
            os.replace(path, old)
            os.replace(partial, path)
        sync(path.parent)
    finally:
        put_back(path)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def put_back(path: Path) -> None:
    """Give a folder its place again that was put aside for another which did not come."""
    old = path.with_name(path.name + ASIDE)
    if old.exists() and not path.exists():
        os.replace(old, path)


def put_all_back(root: Path) -> None:
    """Do that for every folder in one, so that whoever lists it next sees all of them."""
    for old in root.glob(f"*{ASIDE}"):
        put_back(old.with_name(old.name.removesuffix(ASIDE)))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders' names in one step; return whether the system and the disk can."""
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            done = library.renamex_np(first, second, SWAP)
        else:
            done = library.renameat2(AT_FDCWD, first, AT_FDCWD, second, SWAP)
    except AttributeError:  # a C library of before there was such a call
        return False
    return bool(done == 0)
