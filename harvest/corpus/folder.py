"""Files of a folder that are read, and counts of those that are passed over.

Links are followed. What they lead to is read once, and under the name that is no link if there is
one. Of a dataset that was saved by `datasets`, the files that it lists are read.
"""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import HarvestError
from .choices import KNOWN_SUFFIXES, suffix_of
from .counts import Counts
from .forms import ARCHIVE_SUFFIXES, PARTIAL_SUFFIXES

FACTS_BYTES = 1 << 26
"""Largest file that may tell of a saved dataset."""


def files_below(root: Path) -> tuple[list[Path], Counts]:
    """Return the files below a folder in the order of their names, and counts of the others.

    Raises:
        HarvestError: it has no file of a known kind.
    """
    search = _Search(root)
    if not search.files:
        told = f" ({search.counts})" if str(search.counts) else ""
        raise HarvestError(f"data {root}: the folder has no {', '.join(KNOWN_SUFFIXES)} file{told}")
    files = sorted(search.files.values())
    search.counts.keep("entries", len(files))
    return files, search.counts


class _Search:
    """Search of a folder: first what is in it, then the folders and files that links lead to."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.counts = Counts()
        self.files: dict[str, Path] = {}
        """Files to be read, by the path without links."""
        self._seen: set[str] = set()
        """Folders that were walked, by the path without links."""
        self._folders: list[Path] = []
        """Links to folders that were not followed yet."""
        self._links: list[Path] = []
        """Links to files."""
        self._others: dict[str, Path] = {}
        """Files of other kinds, by the path without links."""
        self._walk(root)
        while self._folders:
            self._follow(sorted(self._folders))
        for link in sorted(self._links):
            self._take(link, os.path.realpath(link))
        for real, path in self._others.items():
            if real not in self.files:  # a link of a known kind may lead to it
                self._count("other_files", path)

    def _follow(self, links: list[Path]) -> None:
        self._folders = []
        for link in links:
            real = os.path.realpath(link)
            if Path(os.path.realpath(link.parent)).is_relative_to(real):
                self._count("upward_links", link)
            elif real in self._seen:
                self._count("double_links", link)
            else:
                self._walk(link)

    def _walk(self, top: Path) -> None:
        """Take the files below a folder, and remember the links."""
        for folder, inner, names in os.walk(top, onerror=self._unreadable):
            real = os.path.realpath(folder)
            if real in self._seen:
                self._count("double_links", Path(folder))
                inner.clear()
                continue
            self._seen.add(real)
            for name in sorted((*inner, *names)):
                if name.startswith("."):
                    self._count("hidden_files", Path(folder, name))
            shown = [Path(folder, name) for name in sorted(inner) if not name.startswith(".")]
            self._folders += [path for path in shown if path.is_symlink()]
            inner[:] = [path.name for path in shown if not path.is_symlink()]
            self._take_all(Path(folder), real, sorted(name for name in names if name[0] != "."))

    def _take_all(self, folder: Path, real: str, names: list[str]) -> None:
        """Take the files of one folder that are data."""
        side, missing = _beside_dataset(folder, names)
        for name in missing:
            self._count("missing_files", folder / name)
        present = set(names)
        for name in names:
            path = folder / name
            if name in side:
                self._count("side_files", path)
            elif f"{name}.aria2" in present or path.suffix.lower() in PARTIAL_SUFFIXES:
                if name.removesuffix(".aria2") not in present - {name}:
                    self._count("partial_files", path)
            elif path.is_symlink():
                self._links.append(path)
            else:
                self._take(path, os.path.join(real, name))

    def _take(self, path: Path, real: str) -> None:
        """Take a file if it is one, of a known kind, that was not taken yet."""
        try:
            mode = path.stat().st_mode
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) or path.is_symlink()
            self._count("dangling_links" if gone else "unreadable_files", path)
            return
        suffix = suffix_of(path)
        if not stat.S_ISREG(mode):
            self._count("special_files", path)
        elif suffix in ARCHIVE_SUFFIXES:
            self._count("archive_files", path)
        elif suffix not in KNOWN_SUFFIXES:
            self._others[real] = path
        elif real in self.files:
            self._count("double_links", path)
        else:
            self.files[real] = path

    def _count(self, kind: str, path: Path) -> None:
        self.counts.add(kind, str(path.relative_to(self._root)))

    def _unreadable(self, error: OSError) -> None:
        self.counts.add("unreadable_folders", str(error.filename))


def _beside_dataset(folder: Path, names: Iterable[str]) -> tuple[set[str], list[str]]:
    """Return the files of a folder that are beside the data of `datasets`, and those it lacks.

    A folder of `save_to_disk` lists its data in state.json. The cache of `datasets` has the results
    of a map in cache-*.arrow.
    """
    present = set(names)
    told = {
        name: facts
        for name, key in (
            ("state.json", "_data_files"),
            ("dataset_info.json", "features"),
            ("dataset_dict.json", "splits"),
        )
        if name in present and key in (facts := _facts(folder / name))
    }
    tables = {name for name in present if name.endswith(".arrow")}
    if "state.json" in told:
        listed = _listed(told["state.json"]["_data_files"])
        return {*told, *(tables - listed)}, sorted(listed - present)
    if "dataset_info.json" in told:
        tables = {name for name in tables if name.startswith("cache-")}
        return {*told, *tables}, []
    return set(told), []


def _listed(entries: Any) -> set[str]:
    """Return the names of files that a state.json lists."""
    found = (entry.get("filename") for entry in entries if isinstance(entry, dict))
    return {name for name in found if isinstance(name, str)}


def _facts(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file; empty if it is none."""
    try:
        if file.stat().st_size > FACTS_BYTES:
            return {}
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
