"""`lorsa store rm`: removal of layers from a store, which frees their bytes."""

import errno
import os
from collections.abc import Iterable
from typing import Any

from ...errors import StoreError
from ..folder import Folder, is_begun, layer_folders, orphaned_folders, read_folder
from ..journal import JournalWriter
from ..layers import choose_layers, spell_layers
from ..locks.lock import take_lock
from ..manifest import MANIFEST, PLAN
from ..places import Place, leads_out, place, remove_tree, tree_bytes, write_atomically
from ..table import write_table

_FULL = {errno.ENOSPC, errno.EDQUOT}


def remove_layers(root: str | Place, layers: str) -> dict[str, Any]:
    """Remove layers from a store; what remains is as if they had never been harvested.

    The addition of a layer that is being added ends.

    The metadata is changed first, then the files are deleted. If the process is killed in between,
    the store opens, and the same call ends the removal. On a full disk the files are deleted first.

    Args:
        root: place of the store, finished or not.
        layers: as `choose_layers` reads them.

    Returns:
        JSON-able: the layers that were removed, those that remain, and the bytes that were freed.

    Raises:
        StoreError: no store, a layer that is not there, no layer would remain, or the store is
            being written or cannot be written.
    """
    root = place(root)
    read_folder(root)
    lock = take_lock(root)
    try:
        folder = read_folder(root)  # another process may have been quicker
        chosen = _choose(folder, layers)
        n_bytes = sum(tree_bytes(each) for each in layer_folders(root, chosen))
        try:
            _forget(folder, chosen)
        except (OSError, StoreError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _FULL:
                raise
            _delete(root, chosen)
            _forget(folder, chosen)
        _delete(root, chosen)
    except OSError as error:
        raise StoreError(
            f"layers {layers} of {root} cannot be removed ({error.strerror}); the same command "
            "goes on from here"
        ) from None
    finally:
        lock.release()
    remaining = sorted(set(folder.plan.layers) - set(chosen))
    return {"store": str(root), "removed": chosen, "layers": remaining, "n_bytes": n_bytes}


def _choose(folder: Folder, layers: str) -> list[int]:
    """Return the layers to remove, also those whose removal was interrupted."""
    root, manifest = folder.root, folder.manifest
    have = {int(name.split("/")[1]) for name in orphaned_folders(root, folder.plan)}
    have |= set(manifest.layers) | set(folder.plan.layers)
    try:
        chosen = choose_layers(layers, sorted(have), where=str(root))
    except ValueError as error:
        raise StoreError(str(error)) from None
    if not set(manifest.layers) - set(chosen):
        raise StoreError(
            f"{root} has no layers but {spell_layers(chosen)}; to remove the whole store, delete "
            "its folder"
        )
    for each in layer_folders(root, chosen):
        if (out := leads_out(each, root)) or each.is_symlink():
            where = "leads out of the store" if out else "points into the store"
            raise StoreError(
                f"{each} is a link that {where}; delete what it points to and the link yourself, "
                "then run the same command"
            )
    return chosen


def _forget(folder: Folder, layers: Iterable[int]) -> None:
    """Remove layers from plan, manifest, journal and table, in this order; OSError if one fails."""
    root = folder.root
    gone = {f"layers/{layer}" for layer in layers}
    for name, facts, is_there in (
        (PLAN, folder.plan, is_begun(root)),
        (MANIFEST, folder.manifest, folder.complete),
    ):
        if is_there:
            keep = [n for n in facts.layers if f"layers/{n}" not in gone]
            write_atomically(root / name, facts.only(keep).to_json())
    dropped = {key for key in folder.entries if os.path.dirname(key[1]) in gone}
    if dropped:
        JournalWriter(root).drop(dropped)
        if folder.complete:
            gone |= {f"layers/{layer}" for layer in folder.adding}
            kept = folder.entries.only(lambda array: os.path.dirname(array) not in gone)
            write_table(root, kept, folder.plan.uuid)


def _delete(root: Place, layers: Iterable[int]) -> None:
    for each in layer_folders(root, layers):
        remove_tree(each)
