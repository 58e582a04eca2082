"""`lorsa store verify`: list what is wrong with a store and, if asked, repair what can be.

A site's files of a damaged shard are dropped from the journal and from shards.parquet, and the
manifest is removed: the store is unfinished again, and the same `lorsa harvest` command writes
these files and no others. No file of a shard is removed before another takes its place. If the
process is killed, the same command repairs the rest.
"""

from typing import Any

from ...errors import AGAIN, StoreError, UnreachableError, remedy_of
from ...sites import Site
from ..arrays import site_arrays, together
from ..entries import Entries
from ..folder import is_begun, is_complete, resume_command, sites_being_added, why_not_a_store
from ..journal import Journal, JournalWriter, rewrite_journal
from ..layout import metadata
from ..locks.lock import Lock, take_lock
from ..manifest import MANIFEST, PLAN, read_manifest
from ..places import Place, place, sync, write_atomically
from ..spelling import layers_of
from ..table import write_table
from ..write.writer import StoreWriter
from .adopt import adopted
from .verify import CheckReport, Verification, find_damages


def verify_store(
    root: str | Place,
    *,
    full: bool = False,
    repair: bool = False,
    report: CheckReport = lambda event: None,
) -> dict[str, Any]:
    """Return everything that is wrong with a store as JSON-able data; repair it if asked.

    Args:
        root: place of the store.
        full: whether to read every byte and compare checksums; otherwise presence, sizes and
            metadata are checked.
        repair: whether to drop damaged shards and to rewrite what follows from other records.
        report: called with how much has been read.

    Raises:
        StoreError: no store, one of another format version, or it cannot be written.
    """
    root = place(root)
    if not is_complete(root) and not is_begun(root):
        raise StoreError(why_not_a_store(root))
    if not repair:
        return _result(root, find_damages(root, full=full, report=report), repaired=False)
    lock = take_lock(root)
    try:
        found = find_damages(root, full=full, report=report)
        repaired = all(damage.fix != "none" for damage in found.damages)
        if repaired and (found.damages or found.adding or not found.complete):
            _repair(root, found, lock)
    except OSError as error:
        raise StoreError(
            f"{root} cannot be repaired ({error.strerror}); nothing is lost: "
            f"{remedy_of(error) or AGAIN}"
        ) from None
    finally:
        lock.release()
    return _result(root, found, repaired=repaired)


def _repair(root: Place, found: Verification, lock: Lock) -> None:
    """Make metadata, journal and table agree with the whole files; finish a complete store."""
    manifest = found.manifest
    if not _says(root / PLAN, found):
        write_atomically(root / PLAN, manifest.to_json())
    _repair_metadata(root, found)
    _repair_journal(root, found)
    writer = StoreWriter(root, manifest, lock)
    if not writer.missing_shards():
        writer.finish()
    elif found.complete:
        new = {spec.name for spec in site_arrays(manifest, found.adding)}
        write_table(root, _kept(found).only(lambda array: array not in new), manifest.uuid)
        if writer.status.missing_shards(manifest.sites.keys() - set(found.adding)):
            (root / MANIFEST).unlink()
            sync(root)


def _says(path: Place, found: Verification) -> bool:
    try:
        return read_manifest(path) == found.manifest
    except UnreachableError:
        raise
    except StoreError:
        return False


def _kept(found: Verification) -> Entries:
    """Return the committed files without those of the damaged sites of damaged shards."""
    manifest = found.manifest
    damaged = {(d.shard, d.path.rpartition("/c/")[0]) for d in found.damages if d.is_dropped}
    dropped = set()
    for site in manifest.sites:
        names = {spec.name for spec in site_arrays(manifest, together(manifest, site))}
        dropped |= {(s, name) for s, one in damaged if one in names for name in names}
    return Entries(e for e in found.entries.in_order() if (e.shard, e.array) not in dropped)


def _repair_metadata(root: Place, found: Verification) -> None:
    contents = metadata(found.manifest)
    for damage in found.damages:
        if damage.path in contents:
            path = root / damage.path
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, contents[damage.path])


def _repair_journal(root: Place, found: Verification) -> None:
    """Make the journal list the files that are whole, and no others."""
    known = Journal(root)
    for path in known.damaged:
        rewrite_journal(path)
    keep, listed = _kept(found), known.entries
    journal = JournalWriter(root)
    if gone := set(listed) - set(keep):
        journal.drop(gone)
    if new := [e for e in keep.in_order() if listed.get((e.shard, e.array)) != e]:
        journal.commit(new)
    listed.put(new)
    unfinished = found.adding if found.complete else list(found.manifest.sites)
    for entry in adopted(root, found.manifest, listed, unfinished):
        journal.commit([entry])


def _result(root: Place, found: Verification, *, repaired: bool) -> dict[str, Any]:
    adding = sites_being_added(root) if found.adding else []
    complete = is_complete(root) and not adding
    return {
        "store": str(root),
        "ok": complete and (repaired or not found.damages),
        "full": found.full,
        "has_checksums": found.manifest.is_sealed,
        "complete": complete,
        "n_shards": found.manifest.n_shards,
        "n_missing_shards": len(found.missing),
        "n_files": len(found.entries),
        "n_bytes": found.entries.n_bytes,
        "damages": [damage._asdict() for damage in found.damages],
        "dropped_shards": found.damaged_shards if repaired else [],
        "repaired": repaired and bool(found.damages),
        "leftovers": found.orphaned_folders,
        "adding": layers_of(adding),
        "adding_sites": [str(site) for site in adding],
        "next": _next(root, found, adding, complete=complete, repaired=repaired),
    }


def _next(
    root: Place, found: Verification, adding: list[Site], *, complete: bool, repaired: bool
) -> str | None:
    """Return what to type, None if there is nothing to do."""
    if any(damage.fix == "none" for damage in found.damages):
        return None
    if found.damages and not repaired:
        return f"lorsa store verify {root}{' --full' if found.full else ''} --repair"
    return None if complete else resume_command(root, found.manifest, adding)
