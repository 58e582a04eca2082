"""The folder of a store in any state: begun, finished or neither, and its committed files.

`ActivationStore` opens finished stores to read them; this module serves what creates, checks and
changes stores.
"""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import StoreError, UnreachableError
from ..sites import Site, spell_site_names
from .arrays import DOCUMENTS, ArraySpec, all_arrays, site_arrays, text_arrays
from .bucket import BucketPath
from .entries import Entries, Key
from .journal import read_journal
from .layers import spell_layers
from .locks.bucket_lock import LOCK
from .manifest import JOURNAL, MANIFEST, PLAN, Manifest, read_manifest
from .places import Place, file_sizes, files_in, remove_tree
from .site_facts import channel_of
from .spelling import ATTENTION, layers_of, names_of, spell_sites
from .table import TABLE, read_table

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
        not array.name.endswith(channel_of("")) and (array / "c").is_dir()
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
    """Facts when all is written: with the sites that are being added"""
    complete: bool
    """Whether manifest.json is there"""
    entries: Entries
    """Committed files: from shards.parquet and, for sites that are being added, the journal; from
    the journal alone where the store is unfinished"""

    @property
    def adding(self) -> list[Site]:
        """The sites that are being added, by layer."""
        return added_sites(self.manifest, self.plan)

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
                f"{self.root} is being given {spell_sites(self.adding)}; first end that "
                f"with: {resume_command(self.root, self.plan, self.adding)}"
            )
        if going := added_sites(self.plan, self.manifest):
            raise StoreError(
                f"{self.root} still has sites that were being removed; first end that with: "
                f"{remove_command(self.root, self.manifest, going)}"
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
    new = {spec.name for spec in site_arrays(plan, added_sites(manifest, plan))}
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
    shared = manifest.sites.keys() & plan.sites.keys()
    if different := different_facts(manifest.only(shared), plan.only(shared)):
        raise StoreError(
            f"{root / MANIFEST} says another {', '.join(different)} than {root / PLAN}; move the "
            "one that is wrong out of the store"
        )


def different_facts(one: Manifest, other: Manifest) -> list[str]:
    """Return the names of the facts in which two manifests differ."""
    return [name for name in Manifest.__slots__ if getattr(one, name) != getattr(other, name)]


def added_sites(manifest: Manifest, plan: Manifest) -> list[Site]:
    """Return the sites that a plan has and a manifest has not, by layer."""
    return sorted(plan.sites.keys() - manifest.sites.keys(), key=lambda site: site.place)


def sites_being_added(root: Place) -> list[Site]:
    """Return the sites that are being added to a finished store, by layer.

    Raises:
        StoreError: its manifest cannot be read.
    """
    if not is_complete(root):
        return []
    manifest = read_manifest(root / MANIFEST)
    return added_sites(manifest, _plan_beside(root, manifest))


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


def resume_command(root: Place, manifest: Manifest, sites: Sequence[Site] = ()) -> str:
    """Return the command that finishes a store, or that harvests these sites if any are given.

    It names no setting that is as the store has it.
    """
    request = manifest.request
    if not sites and isinstance(merged := request.get("merged"), list):
        return shlex.join(["lorsa", "store", "merge", *map(str, merged), "--out", str(root)])
    words = ["lorsa", "harvest"]
    chosen = _options_of(sites) if sites else _options_of_all(list(manifest.sites))
    options = {"model": request.get("model"), **chosen, "store": root}
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def remove_command(root: Place, manifest: Manifest, sites: Sequence[Site]) -> str:
    """Return the command that removes some sites of a store."""
    words = ["lorsa", "store", "rm", str(root), "--layers", spell_layers(layers_of(sites))]
    if {site for site in manifest.sites if site.layer in layers_of(sites)} - set(sites):
        words += ["--sites", spell_site_names(names_of(sites))]
    return shlex.join(words)


def _options_of(sites: Sequence[Site]) -> dict[str, str | None]:
    """Return by which options a harvest is asked for sites; None of its default, attention."""
    names = names_of(sites)
    spelled = None if set(names) == set(ATTENTION) else spell_site_names(names)
    return {"layers": spell_layers(layers_of(sites)), "sites": spelled}


def _options_of_all(sites: Sequence[Site]) -> dict[str, str | None]:
    """Return by which options a harvest is asked for all sites of a store.

    None where its layers have different sites: what is not given is as the store has it.
    """
    is_product = len(set(sites)) == len(layers_of(sites)) * len(names_of(sites))
    return _options_of(sites) if is_product else {}


def site_options(sites: Sequence[Site]) -> str:
    """Return how a harvest is asked for all sites of a store: --layers 0-3 --sites mlp.

    Empty where its layers have different sites: then they are not named.
    """
    return " ".join(f"--{n} {value}" for n, value in _options_of_all(sites).items() if value)


def written_again(root: Place, manifest: Manifest, array: str) -> str:
    """Return how to have a file of a finished store written again."""
    merged = bool(manifest.request.get("merged"))
    if not array.startswith("layers/"):  # the text cannot be made again
        return f"delete the store and {'merge' if merged else 'harvest'} again"
    if merged:
        again = resume_command(root, manifest)
        return f"lorsa store verify {root} --repair, then {again} writes it again"
    return "the same lorsa harvest command writes it again"
