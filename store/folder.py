"""The folder of a store in any state: begun, finished or neither, and its committed files.

`ActivationStore` opens finished stores to read them; this module serves what creates, checks and
changes stores.
"""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import StoreError, UnreachableError
from .arrays import DOCUMENTS, ArraySpec, all_arrays, layer_arrays, text_arrays
from .bucket import BucketPath
from .entries import Entries, Key
from .journal import read_journal
from .layers import spell_layers
from .locks.bucket_lock import LOCK
from .manifest import JOURNAL, MANIFEST, PLAN, Manifest, read_manifest
from .places import Place, file_sizes, files_in, remove_tree
from .table import TABLE, read_table

SHARDED = ("attn_in", "attn_out", "norms")
"""Arrays of a layer whose shards are written after the plan."""
OUR_NAMES = {JOURNAL, DOCUMENTS, TABLE, "zarr.json", "tokens", "documents", "layers", "weights"}
"""Names that an unfinished store may contain."""


def is_complete(root: Place) -> bool:
    """Return whether a folder holds a finished store."""
    return (root / MANIFEST).is_file()


def is_begun(root: Place) -> bool:
    """Return whether a folder holds a store whose harvest can go on."""
    return (root / PLAN).is_file()


def is_hardly_begun(root: Place) -> bool:
    """Return whether a folder holds a store whose creation was interrupted before the plan.

    One with shards of a layer has lost its plan: there is nothing that may be made anew.
    """
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return (
        ((names == [JOURNAL] and _is_empty(root / JOURNAL)) or (root / JOURNAL / LOCK).is_file())
        and not is_begun(root)
        and not is_complete(root)
        and all(_is_ours(name) for name in names)
        and not has_shards(root)
    )


def has_shards(root: Place) -> bool:
    """Return whether shards of a layer are there, or a journal file of those who write them."""
    if files_in(root / JOURNAL, "w*.jsonl"):
        return True
    layers = root / "layers"
    return layers.is_dir() and any(
        array.name in SHARDED and (array / "c").is_dir()
        for layer in layers.iterdir()
        if layer.is_dir()
        for array in layer.iterdir()
    )


def _is_empty(folder: Place) -> bool:
    return folder.is_dir() and next(iter(folder.iterdir()), None) is None


def _is_ours(name: str) -> bool:
    # zarr writes zarr.json under a name such as zarr.923bf3cc.partial, which a kill leaves behind
    return name in OUR_NAMES or (name.startswith("zarr.") and name.endswith(".partial"))


def require_free(root: Place) -> None:
    """Raise StoreError unless a new store may be created here.

    A store whose creation was interrupted before the plan does not count.
    """
    if root.is_dir():
        if not is_begun(root) and not is_complete(root) and has_shards(root):
            raise StoreError(why_not_a_store(root))
        if any(root.iterdir()) and not is_hardly_begun(root):
            raise StoreError(f"{root} is a folder with other things in it; choose an empty one")
    elif root.is_file():  # another process may make the folder right now
        raise StoreError(f"{root} is a file; choose a folder")
    if isinstance(root, BucketPath):
        return
    parent = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StoreError(f"{root} cannot be made in {parent}; choose another folder")


def clear(root: Place) -> None:
    """Remove the files of a store that was hardly begun; the lock is held."""
    for path in root.iterdir():
        if path.name == JOURNAL:
            for file in path.glob("*.jsonl"):
                file.unlink()
        elif path.is_dir():
            remove_tree(path)
        else:
            path.unlink()


def why_not_a_store(root: Place) -> str:
    """Return a message: what a folder without a manifest is, and what to type."""
    if is_begun(root):
        return (
            f"{root} is unfinished: run the same lorsa harvest command again, it goes on "
            f"(lorsa store info {root} shows it)"
        )
    if is_hardly_begun(root):
        return f"{root} is hardly begun: run the same lorsa harvest command again"
    if root.is_dir() and has_shards(root):
        return (
            f"{root} has shards but neither {MANIFEST} nor {PLAN}, which says what they are of; "
            "restore one of them from a copy, or choose another --store"
        )
    if not root.exists():
        return (
            f"{root} does not exist; make a store with: lorsa harvest --model MODEL --store {root}"
        )
    return f"{root} is no activation store ({MANIFEST} is missing); give the folder of a harvest"


class Folder(NamedTuple):
    """State of a store, finished or not."""

    root: Place
    manifest: Manifest
    """Facts of manifest.json, or of the plan where there is none yet"""
    plan: Manifest
    """Facts when all is written: with the layers that are being added"""
    complete: bool
    """Whether manifest.json is there"""
    entries: Entries
    """Committed files: from shards.parquet and, for layers that are being added, the journal; from
    the journal alone where the store is unfinished"""

    @property
    def adding(self) -> list[int]:
        """The layers that are being added, ascending."""
        return sorted(set(self.plan.layers) - set(self.manifest.layers))

    def missing_shards(self) -> list[int]:
        """Return the shards with a file that is not committed or not there."""
        arrays = all_arrays(self.plan).values()
        return missing_shards(self.root, self.plan, self.entries, arrays)

    def require_finished(self) -> None:
        """Raise StoreError, with what to type, unless the store is finished and nothing changes."""
        if not self.complete:
            raise StoreError(why_not_a_store(self.root))
        if self.adding:
            raise StoreError(
                f"{self.root} is being given layers {spell_layers(self.adding)}; first end that "
                f"with: {resume_command(self.root, self.plan, self.adding)}"
            )
        if going := sorted(set(self.manifest.layers) - set(self.plan.layers)):
            raise StoreError(
                f"{self.root} still has layers that were being removed; first end that with: "
                f"lorsa store rm {self.root} --layers {spell_layers(going)}"
            )
        if self.missing_shards():
            raise StoreError(f"{self.root} lacks files; first: {repair_command(self.root)}")


def read_folder(root: Place) -> Folder:
    """Read manifest, plan and committed files of a store.

    Raises:
        StoreError: no store, another format version, or a damaged manifest, table or journal.
    """
    complete = is_complete(root)
    if not complete:
        if not is_begun(root):
            raise StoreError(why_not_a_store(root))
        plan = read_manifest(root / PLAN)
        return Folder(root, plan, plan, complete, read_journal(root))
    manifest = read_manifest(root / MANIFEST)
    plan = _plan_beside(root, manifest)
    entries = read_table(root, manifest)
    adding = [n for n in plan.layers if n not in manifest.layers]
    new = {spec.name for layer in adding for spec in layer_arrays(plan, layer)}
    if new:
        entries = entries.only(lambda array: array not in new)
        entries.put(read_journal(root).only(new.__contains__).in_order())
    return Folder(root, manifest, plan, complete, entries)


def _plan_beside(root: Place, manifest: Manifest) -> Manifest:
    """Return the plan of a finished store; the manifest itself if the plan cannot be read."""
    try:
        return read_manifest(root / PLAN) if is_begun(root) else manifest
    except UnreachableError:
        raise
    except StoreError:
        return manifest


def require_agreement(root: Place, manifest: Manifest) -> None:
    """Raise StoreError if the plan says other facts than a manifest that has no checksum."""
    if manifest.is_sealed:
        return
    plan = _plan_beside(root, manifest)
    shared = manifest.layers.keys() & plan.layers.keys()
    if different := different_facts(manifest.only(shared), plan.only(shared)):
        raise StoreError(
            f"{root / MANIFEST} says another {', '.join(different)} than {root / PLAN}; move the "
            "one that is wrong out of the store"
        )


def different_facts(one: Manifest, other: Manifest) -> list[str]:
    """Return the names of the facts in which two manifests differ."""
    return [name for name in Manifest.__slots__ if getattr(one, name) != getattr(other, name)]


def layers_being_added(root: Place) -> list[int]:
    """Return the layers that are being added to a finished store, ascending.

    Raises:
        StoreError: its manifest cannot be read.
    """
    if not is_complete(root):
        return []
    manifest = read_manifest(root / MANIFEST)
    return sorted(set(_plan_beside(root, manifest).layers) - set(manifest.layers))


def layer_folders(root: Place, layers: Iterable[int]) -> list[Place]:
    """Return the folders of layers that exist; those below layers/ last: `rm` finds them by it."""
    found = [root / kind / str(layer) for layer in layers for kind in ("weights", "layers")]
    return [folder for folder in found if folder.exists() or folder.is_symlink()]


def lost_files(root: Place, arrays: Mapping[str, ArraySpec], entries: Entries) -> set[Key]:
    """Return the committed files of these arrays that are missing or of another size."""
    size = file_sizes(root)
    lost = set()
    for name, spec in arrays.items():
        shards, facts = entries.of(name)
        for shard, n_bytes in zip(shards.tolist(), facts["n_bytes"].tolist(), strict=True):
            if size(spec.shard_name(shard)) != n_bytes:
                lost.add((shard, name))
    return lost


def missing_shards(
    root: Place, manifest: Manifest, entries: Entries, arrays: Iterable[ArraySpec]
) -> list[int]:
    """Return the shards with a file of these arrays that is not committed or not there."""
    specs = {spec.name: spec for spec in arrays}
    lost = {shard for shard, _ in lost_files(root, specs, entries)}
    whole = entries.whole(manifest.n_shards, specs)
    return [shard for shard, found in enumerate(whole.tolist()) if not found or shard in lost]


def require_covered(root: Place, manifest: Manifest, committed: Entries) -> None:
    """Raise StoreError unless the journal lists the token ids and all files of the table."""
    names = all_arrays(manifest)
    table = read_table(root, manifest) if is_complete(root) else Entries()
    if any(key not in committed for key in table.only(names.__contains__)):
        raise StoreError(
            f"{root} has a journal that lacks files of {TABLE}; write it anew with: "
            f"{repair_command(root)}"
        )
    if missing_shards(root, manifest, committed, text_arrays(manifest)):
        raise StoreError(
            f"{root} lacks token ids: {repair_command(root)} says which; restore them from a copy, "
            "or harvest into another --store"
        )


def repair_command(root: Place) -> str:
    """Return the command that repairs a store as far as it can be."""
    return shlex.join(["lorsa", "store", "verify", str(root), "--repair"])


def text_names(manifest: Manifest) -> set[str]:
    """Return the arrays that no harvest can write again: tokens and their documents."""
    return {spec.name for spec in text_arrays(manifest)}


def orphaned_folders(root: Place, manifest: Manifest) -> list[str]:
    """Return the folders of layers that are not, or no longer, in the store, by name."""
    known = {str(layer) for layer in manifest.layers}
    return [
        f"{kind}/{name}"
        for kind in ("layers", "weights")
        if (root / kind).is_dir()
        for name in sorted(path.name for path in (root / kind).iterdir())
        if name.isdecimal() and name not in known
    ]


def resume_command(root: Place, manifest: Manifest, layers: Sequence[int] = ()) -> str:
    """Return the command that finishes a store, or these layers of it if any are given."""
    request = manifest.request
    if not layers and isinstance(merged := request.get("merged"), list):
        return shlex.join(["lorsa", "store", "merge", *map(str, merged), "--out", str(root)])
    words = ["lorsa", "harvest"]
    options = {
        "model": request.get("model"),
        "layers": spell_layers(sorted(layers) or list(manifest.layers)),
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
    """Return how to have a file of a finished store written again."""
    merged = bool(manifest.request.get("merged"))
    if not array.startswith("layers/"):  # the text cannot be made again
        return f"delete the store and {'merge' if merged else 'harvest'} again"
    if merged:
        again = resume_command(root, manifest)
        return f"lorsa store verify {root} --repair, then {again} writes it again"
    return "the same lorsa harvest command writes it again"
