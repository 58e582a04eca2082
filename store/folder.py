"""A store's folder as it lies there: begun or finished or neither, and what is known of its files.

`ActivationStore` opens finished stores to read them; this is for looking after them.
"""

import os
import shlex
from collections.abc import Iterable
from typing import NamedTuple

from .bucket import BucketPath
from .errors import StoreError
from .journal import JOURNAL, LOCK, TABLE, Entry, Key, read_journal, read_table
from .layers import spell_layers
from .layout import DOCUMENTS, ArraySpec, all_arrays, text_arrays
from .manifest import MANIFEST, PLAN, Manifest, read_manifest
from .places import Place, file_sizes, remove_tree

OUR_NAMES = {JOURNAL, DOCUMENTS, TABLE, "zarr.json", "tokens", "documents", "layers", "weights"}
"""What an unfinished store may hold."""


def is_complete(root: Place) -> bool:
    """Tell whether a folder holds a finished store."""
    return (root / MANIFEST).is_file()


def is_begun(root: Place) -> bool:
    """Tell whether a folder holds a store whose harvest can go on."""
    return (root / PLAN).is_file()


def is_hardly_begun(root: Place) -> bool:
    """Tell whether a folder holds a store whose making was cut short before there was a plan."""
    return (
        (root / JOURNAL / LOCK).is_file()
        and not is_begun(root)
        and not is_complete(root)
        and all(_is_ours(path.name) for path in root.iterdir())
    )


def _is_ours(name: str) -> bool:
    # zarr writes zarr.json under a name such as zarr.923bf3cc.partial, which a kill leaves behind
    return name in OUR_NAMES or (name.startswith("zarr.") and name.endswith(".partial"))


def require_free(root: Place) -> None:
    """Raise StoreError unless a new store may be made here.

    A store whose making was cut short before there was a plan is in nobody's way.
    """
    if root.is_dir():
        if any(root.iterdir()) and not is_hardly_begun(root):
            raise StoreError(f"{root} is a folder with other things in it; choose an empty one")
    elif root.exists():
        raise StoreError(f"{root} is a file; choose a folder")
    if isinstance(root, BucketPath):
        return
    parent = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StoreError(f"{root} cannot be made in {parent}; choose another folder")


def clear(root: Place) -> None:
    """Remove what a store that was hardly begun has left; the lock is held."""
    for path in root.iterdir():
        if path.name == JOURNAL:
            for file in path.glob("*.jsonl"):
                file.unlink()
        elif path.is_dir():
            remove_tree(path)
        else:
            path.unlink()


def why_not_a_store(root: Place) -> str:
    """Say what a folder without a manifest is, and what to type."""
    if is_begun(root):
        return (
            f"{root} is unfinished: run the same lorsa harvest command again, it goes on "
            f"(lorsa store info {root} shows it)"
        )
    if is_hardly_begun(root):
        return f"{root} is hardly begun: run the same lorsa harvest command again"
    if not root.exists():
        return (
            f"{root} does not exist; make a store with: lorsa harvest --model MODEL --store {root}"
        )
    return f"{root} is no activation store ({MANIFEST} is missing); give the folder of a harvest"


class Folder(NamedTuple):
    """A store, finished or not."""

    root: Place
    manifest: Manifest
    """Of manifest.json, or of the plan where there is none yet"""
    complete: bool
    """Whether manifest.json is there"""
    entries: dict[Key, Entry]
    """Its committed files: of shards.parquet, or of the journal"""

    def missing_shards(self) -> list[int]:
        """Return the shards of which some file is not committed or not there."""
        arrays = all_arrays(self.manifest).values()
        return missing_shards(self.root, self.manifest, self.entries, arrays)


def look(root: Place) -> Folder:
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


def missing_shards(
    root: Place, manifest: Manifest, entries: dict[Key, Entry], arrays: Iterable[ArraySpec]
) -> list[int]:
    """Return the shards of which a file of some arrays is not committed or not there."""
    specs, size = list(arrays), file_sizes(root)
    return [
        shard
        for shard in range(manifest.n_shards)
        if not all(
            (entry := entries.get((shard, spec.name))) is not None
            and size(spec.shard_path(root, shard)) == entry.n_bytes
            for spec in specs
        )
    ]


def require_covered(root: Place, manifest: Manifest, committed: dict[Key, Entry]) -> None:
    """Raise StoreError unless the journal tells of the token ids and what a table counts on."""
    names = all_arrays(manifest)
    told = read_table(root) if is_complete(root) else []
    if any((e.shard, e.array) not in committed for e in told if e.array in names):
        raise StoreError(
            f"{root} has a journal that lacks files of {TABLE}; write it anew with: {mending(root)}"
        )
    if missing_shards(root, manifest, committed, text_arrays(manifest)):
        remedy = f"see {mending(root)}" if told else "delete it and harvest again"
        raise StoreError(f"{root} lacks token ids; {remedy}")


def mending(root: Place) -> str:
    """Return the command that mends what can be mended of a store."""
    return shlex.join(["lorsa", "store", "verify", str(root), "--repair"])


def text_names(manifest: Manifest) -> set[str]:
    """Return the arrays that no harvest writes again: tokens and their documents."""
    return {spec.name for spec in text_arrays(manifest)}


def leftovers(root: Place, manifest: Manifest) -> list[str]:
    """Return folders of layers that are not, or no longer, in the store."""
    known = {str(layer) for layer in manifest.layers}
    return [
        f"{room}/{name}"
        for room in ("layers", "weights")
        if (root / room).is_dir()
        for name in sorted(path.name for path in (root / room).iterdir())
        if name.isdecimal() and name not in known
    ]


def going_on(root: Place, manifest: Manifest) -> str:
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
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)


def written_again(root: Place, manifest: Manifest, array: str) -> str:
    """Say how a finished store gets a file of an array back."""
    merged = bool(manifest.request.get("merged"))
    if not array.startswith("layers/"):  # what the model reads cannot be made again
        return f"delete the store and {'merge' if merged else 'harvest'} again"
    if merged:
        again = going_on(root, manifest)
        return f"lorsa store verify {root} --repair, then {again} writes it again"
    return "the same lorsa harvest command writes it again"
