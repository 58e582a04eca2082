"""`lorsa store rm`: removal of sites or whole layers from a store, which frees their bytes."""

import errno
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ...errors import StoreError, UsageError
from ...sites import SITE_NAMES, Site, parse_site_names
from ..arrays import all_arrays
from ..folder import Folder, is_begun, read_folder
from ..journal import JournalWriter
from ..layers import choose_layers
from ..locks.lock import take_lock
from ..manifest import MANIFEST, PLAN, Manifest
from ..places import Place, leads_out, place, remove_tree, tree_bytes, write_atomically
from ..rooms import orphaned_sites, own_folders
from ..spelling import layers_of, spell_sites
from ..table import write_table

_FULL = {errno.ENOSPC, errno.EDQUOT}


def remove_sites(root: str | Place, layers: str = "all", sites: str = "all") -> dict[str, Any]:
    """Remove sites from a store; what remains is as if they had never been harvested.

    The addition of a site that is being added ends.

    The metadata is changed first, then the files are deleted. If the process is killed in between,
    the store opens, and the same call ends the removal. On a full disk the files are deleted first.

    Args:
        root: place of the store, finished or not.
        layers: as `choose_layers` reads them.
        sites: which sites of them: all, mlp,resid_in, or with their layers, 3.mlp_in,5.attn.

    Returns:
        JSON-able: the sites that were removed, those that remain, and the bytes that were freed.

    Raises:
        UsageError: a name is no site's; the message names near ones.
        StoreError: no store, a site that is not there or that others are derived from, no site
            would remain, or the store is being written or cannot be written.
    """
    root = place(root)
    read_folder(root)
    lock = take_lock(root)
    try:
        folder = read_folder(root)  # another process may have been quicker
        chosen = _choose(folder, layers, sites)
        n_bytes = sum(map(tree_bytes, own_folders(root, _either(folder), chosen)))
        try:
            _forget(folder, chosen)
        except (OSError, StoreError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _FULL:
                raise
            _delete(folder, chosen)
            _forget(folder, chosen)
        _delete(folder, chosen)
    except OSError as error:
        raise StoreError(
            f"{spell_sites(chosen)} of {root} cannot be removed ({error.strerror}); the same "
            "command goes on from here"
        ) from None
    finally:
        lock.release()
    remaining = sorted(folder.plan.sites.keys() - chosen, key=lambda site: site.place)
    return {
        "store": str(root),
        "removed": layers_of(chosen),
        "removed_sites": [str(site) for site in sorted(chosen, key=lambda site: site.place)],
        "layers": layers_of(remaining),
        "sites": [str(site) for site in remaining],
        "n_bytes": n_bytes,
    }


def _choose(folder: Folder, layers: str, sites: str) -> set[Site]:
    """Return the sites to remove, also those whose removal was interrupted."""
    root, manifest = folder.root, folder.manifest
    have = orphaned_sites(root, folder.plan) | manifest.sites.keys() | folder.plan.sites.keys()
    try:
        among = choose_layers(layers, layers_of(have), where=str(root))
    except ValueError as error:
        raise StoreError(str(error)) from None
    wanted, named = _named(sites, among)
    chosen = (wanted | named) & have
    if lacking := named - have or (not chosen and wanted):
        raise StoreError(f"{root} has no {spell_sites(lacking)}; it has {spell_sites(have)}")
    if not manifest.sites.keys() - chosen:
        raise StoreError(
            f"{root} has nothing but {spell_sites(chosen)}; to remove the whole store, delete its "
            "folder"
        )
    for facts in (manifest, folder.plan):
        _require_unneeded(facts, chosen)
    for each in own_folders(root, _either(folder), chosen):
        if (out := leads_out(each, root)) or each.is_symlink():
            where = "leads out of the store" if out else "points into the store"
            raise StoreError(
                f"{each} is a link that {where}; delete what it points to and the link yourself, "
                "then run the same command"
            )
    return chosen


def _named(text: str, layers: Collection[int]) -> tuple[set[Site], set[Site]]:
    """Return the sites that a text such as mlp,3.resid_in names: in some layers, and one by one.

    Raises:
        UsageError: a part is no site; the message names near ones.
    """
    found: set[Site] = set()
    named: set[Site] = set()
    for part in (each.strip() for each in text.split(",")):
        layer, dot, name = part.rpartition(".")
        if dot and layer.isascii() and layer.isdecimal():
            named |= {Site(int(layer), each) for each in _names(name)}
            continue
        names = SITE_NAMES if part == "all" else _names(part)
        found |= {Site(layer, each) for layer in layers for each in names}
    return found, named


def _names(text: str) -> tuple[str, ...]:
    """Return the names that a text means; UsageError if it means none."""
    try:
        return parse_site_names(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _require_unneeded(manifest: Manifest, chosen: Collection[Site]) -> None:
    """Raise StoreError if a site that would remain is derived from one that would not."""
    for site, facts in manifest.sites.items():
        if site in chosen or facts.derived is None:
            continue
        if needed := set(facts.derived.sites) & set(chosen):
            raise StoreError(
                f"{site} is derived from {spell_sites(needed)}; remove it too, or leave that"
            )


def _either(folder: Folder) -> Manifest:
    """Return the facts of all sites in the store, as its manifest or its plan has them."""
    one, other = folder.manifest, folder.plan
    return replace(
        other, sites={**one.sites, **other.sites}, modules={**one.modules, **other.modules}
    )


def _forget(folder: Folder, sites: Collection[Site]) -> None:
    """Remove sites from plan, manifest, journal and table, in this order; OSError if one fails."""
    root = folder.root
    for name, facts, is_there in (
        (PLAN, folder.plan, is_begun(root)),
        (MANIFEST, folder.manifest, folder.complete),
    ):
        if is_there:
            write_atomically(root / name, _without(facts, sites).to_json())
    left = all_arrays(_without(_either(folder), sites))
    if dropped := {key for key in folder.entries if key[1] not in left}:
        JournalWriter(root).drop(dropped)
        if folder.complete:
            rows = all_arrays(_without(folder.manifest, sites))
            write_table(root, folder.entries.only(rows.__contains__), folder.plan.uuid)


def _without(manifest: Manifest, sites: Collection[Site]) -> Manifest:
    return manifest.only(manifest.sites.keys() - set(sites))


def _delete(folder: Folder, sites: Collection[Site]) -> None:
    for each in own_folders(folder.root, _either(folder), sites):
        remove_tree(each)
