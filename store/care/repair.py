"""`lorsa store verify`: say what is wrong with a store and, if asked, mend what can be.

A layer's files of a damaged shard are dropped from the journal and from shards.parquet and the
manifest is taken away: the store is unfinished again, and the same `lorsa harvest` command writes
these files and no others. No file of a shard is removed before another takes its place. Killed at
any moment, the same command mends what is left.
"""

from typing import Any

from ...errors import StoreError
from ..entries import Entries, write_table
from ..folder import is_begun, is_complete, layers_being_added, resume_command, why_not_a_store
from ..journal import Journal, JournalWriter, rewrite_journal
from ..locks.lock import Lock, take_lock
from ..manifest import MANIFEST, PLAN, read_manifest
from ..places import Place, place, sync, write_atomically
from ..schema import metadata
from ..write.writer import StoreWriter
from .verify import Report, Verification, find_damages


def verify_store(
    root: str | Place,
    *,
    full: bool = False,
    repair: bool = False,
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """Return everything that is wrong with a store as JSON-able data; mend it if asked.

    Args:
        root: its folder.
        full: read every byte and compare checksums; without it, presence, sizes and metadata.
        repair: drop damaged shards, and rewrite what follows from the rest.
        report: is told how far the reading is.

    Raises:
        StoreError: no store, one of another format version, or it cannot be written.
    """
    root = place(root)
    if not is_complete(root) and not is_begun(root):
        raise StoreError(why_not_a_store(root))
    if not repair:
        return _result(root, find_damages(root, full=full, report=report), mended=False)
    lock = take_lock(root)
    try:
        found = find_damages(root, full=full, report=report)
        mended = all(damage.fix != "none" for damage in found.damages)
        if mended and (found.damages or found.adding or not found.complete):
            _mend(root, found, lock)
    except OSError as error:
        raise StoreError(
            f"{root} cannot be repaired ({error.strerror}); nothing is lost: make room and run "
            "the same command again"
        ) from None
    finally:
        lock.release()
    return _result(root, found, mended=mended)


def _mend(root: Place, found: Verification, lock: Lock) -> None:
    """Bring metadata and index to what is whole; finish the store if that is everything."""
    manifest = found.manifest
    if not _says(root / PLAN, found):
        write_atomically(root / PLAN, manifest.to_json())
    _mend_metadata(root, found)
    _mend_journal(root, found)
    writer = StoreWriter(root, manifest, lock)
    if not writer.missing_shards():
        writer.finish()
    elif found.complete:
        new = tuple(f"layers/{layer}/" for layer in found.adding)
        write_table(root, _kept(found).only(lambda array: not array.startswith(new)))
        if writer.status.missing_shards(set(manifest.layers) - set(found.adding)):
            (root / MANIFEST).unlink()
            sync(root)


def _says(path: Place, found: Verification) -> bool:
    try:
        return read_manifest(path) == found.manifest
    except StoreError:
        return False


def _kept(found: Verification) -> Entries:
    """Return the files that are still counted on: all but those of layers in damaged shards."""
    dropped = {(d.shard, "/".join(d.path.split("/")[:2])) for d in found.damages if d.is_dropped}
    return Entries(
        entry
        for entry in found.entries.in_order()
        if (entry.shard, entry.array.rpartition("/")[0]) not in dropped
    )


def _mend_metadata(root: Place, found: Verification) -> None:
    contents = metadata(found.manifest)
    for damage in found.damages:
        if damage.path in contents:
            path = root / damage.path
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, contents[damage.path])


def _mend_journal(root: Place, found: Verification) -> None:
    """Make the journal tell of the files that are whole, and of no others."""
    known = Journal(root)
    for path in known.damaged:
        rewrite_journal(path)
    keep, told = _kept(found), known.entries
    journal = JournalWriter(root)
    if gone := set(told) - set(keep):
        journal.drop(gone)
    if new := [e for e in keep.in_order() if told.get((e.shard, e.array)) != e]:
        journal.commit(new)


def _result(root: Place, found: Verification, *, mended: bool) -> dict[str, Any]:
    adding = layers_being_added(root) if found.adding else []
    complete = is_complete(root) and not adding
    return {
        "store": str(root),
        "ok": complete and (mended or not found.damages),
        "full": found.full,
        "complete": complete,
        "n_shards": found.manifest.n_shards,
        "n_missing_shards": len(found.missing),
        "n_files": len(found.entries),
        "n_bytes": found.entries.n_bytes,
        "damages": [damage._asdict() for damage in found.damages],
        "dropped_shards": found.damaged_shards if mended else [],
        "repaired": mended and bool(found.damages),
        "leftovers": found.orphaned_folders,
        "adding": adding,
        "next": _next(root, found, adding, complete=complete, mended=mended),
    }


def _next(
    root: Place, found: Verification, adding: list[int], *, complete: bool, mended: bool
) -> str | None:
    """Return what to type, None if there is nothing to do."""
    if any(damage.fix == "none" for damage in found.damages):
        return None
    if found.damages and not mended:
        return f"lorsa store verify {root}{' --full' if found.full else ''} --repair"
    return None if complete else resume_command(root, found.manifest, adding)
