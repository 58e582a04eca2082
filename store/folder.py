"""A store's folder as it lies there: finished or not, with what is known of its files.

`ActivationStore` opens finished stores to read them; this is for looking after them.
"""

import shlex
from pathlib import Path
from typing import NamedTuple

from .errors import StoreError
from .journal import Entry, Key, read_journal, read_table
from .layers import spell_layers
from .layout import all_arrays, text_arrays
from .manifest import MANIFEST, PLAN, Manifest, read_manifest
from .reader import why_not_a_store
from .writer import is_begun, is_complete


class Folder(NamedTuple):
    """A store, finished or not."""

    root: Path
    manifest: Manifest
    """Of manifest.json, or of the plan where there is none yet"""
    complete: bool
    """Whether manifest.json is there"""
    entries: dict[Key, Entry]
    """Its committed files: of shards.parquet, or of the journal"""

    def missing_shards(self) -> list[int]:
        """Return the shards of which some file is not committed or not there."""
        arrays = all_arrays(self.manifest)
        return [
            shard
            for shard in range(self.manifest.n_shards)
            if not all(
                (entry := self.entries.get((shard, name))) is not None
                and file_size(spec.shard_path(self.root, shard)) == entry.n_bytes
                for name, spec in arrays.items()
            )
        ]


def look(root: Path) -> Folder:
    """Return what a store's folder tells of itself.

    Raises:
        StoreError: no store, another format version, or a damaged manifest, table or journal.
    """
    if is_complete(root):
        manifest, entries = read_manifest(root / MANIFEST), read_table(root)
    elif is_begun(root):
        manifest, entries = read_manifest(root / PLAN), read_journal(root)
    else:
        raise StoreError(why_not_a_store(root))
    return Folder(root, manifest, is_complete(root), {(e.shard, e.array): e for e in entries})


def file_size(path: Path) -> int | None:
    """Return the bytes of a file, None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def text_names(manifest: Manifest) -> set[str]:
    """Return the arrays that no harvest writes again: tokens and their documents."""
    return {spec.name for spec in text_arrays(manifest)}


def going_on(root: Path, manifest: Manifest) -> str:
    """Return the command that finishes a store."""
    request = manifest.request
    if isinstance(merged := request.get("merged"), list):
        return shlex.join(["lorsa", "store", "merge", *map(str, merged), "--out", str(root)])
    words = ["lorsa", "harvest"]
    options = {
        "model": request.get("model"),
        "layers": spell_layers(list(manifest.layers)),
        "store": root,
    } | request
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
