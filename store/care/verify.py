"""Verification of a store: all of its damage, not only the first.

The quick check compares presence, sizes and Zarr metadata with the manifest and shards.parquet, or,
in an unfinished store, the journal. The full check also reads every byte, compares each chunk with
its checksum, and the chunks' checksums with the file's, which finds a file in another's place.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import DamageError, StoreError, UnreachableError
from ...sites import Site
from ..arrays import DOCUMENTS, all_arrays, site_arrays, whole_arrays
from ..entries import Entries, Entry, Key
from ..fixed import array_problem, read_documents
from ..folder import is_complete, text_names
from ..layout import metadata
from ..manifest import JOURNAL, Manifest
from ..places import Place, file_sizes, reading
from ..rooms import orphaned_folders
from ..schema import difference
from ..shard import read_checksum
from ..table import TABLE
from ..unlisted import lost_shards
from .records import Damage, Fix, committed_files, name_of, read_manifests

MISSING = "is missing"
N_THREADS = min(8, os.cpu_count() or 1)


class Checked(NamedTuple):
    """Progress of a full verification or a merge."""

    n_bytes: int
    total_bytes: int


CheckReport = Callable[[Checked], None]
"""Receiver of progress"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """State of a store that was checked."""

    manifest: Manifest
    """Facts of the store, with the sites that are being added."""
    adding: list[Site]
    """Sites that are being added."""
    complete: bool
    """Whether manifest.json is there."""
    full: bool
    """Whether every byte was read."""
    entries: Entries
    """Files that were committed."""
    missing: list[int]
    """Shards that are damaged or not committed in full."""
    damages: list[Damage]
    orphaned_folders: list[str]
    """Folders of layers, sites or modules that are not in the store: a removal was interrupted."""

    @property
    def damaged_shards(self) -> list[int]:
        """Shards to harvest again, ascending."""
        return sorted({d.shard for d in self.damages if d.shard is not None and d.is_dropped})


def find_damages(
    root: Place, *, full: bool, report: CheckReport = lambda event: None
) -> Verification:
    """Find everything that is wrong with a store.

    Args:
        root: place of the store.
        full: whether to read every byte.
        report: called with how much has been read.

    Raises:
        StoreError: no store, another format version, or neither manifest nor plan can be read.
    """
    damages: list[Damage] = []
    manifest, adding = read_manifests(root, damages)
    complete = is_complete(root)
    new = {spec.name for spec in site_arrays(manifest, adding)}
    entries = committed_files(root, manifest, complete, damages, new)
    damages += _metadata_damages(root, manifest)
    damages += _fixed_damages(root, manifest, full=full)
    whole: dict[Key, Entry] = {}
    for key, damage in _file_damages(
        root, manifest, entries, new if complete else set(all_arrays(manifest))
    ):
        if damage is None:
            whole[key] = entries[key]
        else:
            damages.append(damage)
    damages += _journal_damages(root, manifest, entries, adding if complete else manifest.sites)
    if full:
        damages += _checksum_damages(root, manifest, whole, report)
    lost = {damage.shard for damage in damages}
    arrays = all_arrays(manifest)
    missing = [
        shard
        for shard in range(manifest.n_shards)
        if shard in lost or not all((shard, name) in whole for name in arrays)
    ]
    return Verification(
        manifest=manifest,
        adding=adding,
        complete=complete,
        full=full,
        entries=entries,
        missing=missing,
        damages=damages,
        orphaned_folders=orphaned_folders(root, manifest),
    )


def _journal_damages(
    root: Place, manifest: Manifest, entries: Entries, unfinished: Iterable[Site]
) -> Iterator[Damage]:
    if lost := lost_shards(root, manifest, entries, unfinished):
        yield Damage(JOURNAL, f"lists none of {len(lost)} shards that are there", "rewrite")


def _metadata_damages(root: Place, manifest: Manifest) -> Iterator[Damage]:
    for name, content in metadata(manifest).items():
        problem = difference(root / name, content)
        if problem is not None:
            yield Damage(name, problem, "rewrite")


def _fixed_damages(root: Place, manifest: Manifest, *, full: bool) -> Iterator[Damage]:
    """Yield the damage of files that no harvest can write again."""
    try:
        n_names = len(read_documents(root, manifest))
        n_known = manifest.corpus.get("n_documents")
        if n_known not in (None, n_names):
            yield Damage(DOCUMENTS, f"names {n_names} documents of {n_known}", "none")
    except UnreachableError:
        raise
    except StoreError:
        there = (root / DOCUMENTS).exists()
        problem = "is damaged, or another store's" if there else "is missing"
        yield Damage(DOCUMENTS, problem, "none")
    for name, shape in whole_arrays(manifest):
        found = array_problem(root, manifest, name, shape, full=full)
        if found is not None:
            yield Damage(*found, "none")


def _file_damages(
    root: Place, manifest: Manifest, entries: Entries, unfinished: set[str]
) -> Iterator[tuple[Key, Damage | None]]:
    """Yield every file that should exist, with its damage or None.

    Of unfinished arrays, only the committed files should exist.
    """
    given, size = text_names(manifest), file_sizes(root)
    for shard in range(manifest.n_shards):
        n_seq = len(manifest.shard_rows(shard))
        for name, spec in all_arrays(manifest).items():
            entry = entries.get((shard, name))
            path = spec.shard_path(root, shard)
            if entry is None and name in unfinished and name not in given:
                continue  # not harvested yet
            problem = _problem(size(spec.shard_name(shard)), entry, n_seq)
            if problem is None:
                yield (shard, name), None
            else:
                fix: Fix = "none" if name in given else "harvest"
                if entry is None and name in given and name in unfinished and problem != MISSING:
                    fix = "rewrite"  # its line in the journal is lost
                yield (shard, name), Damage(name_of(root, path), problem, fix, shard)


def _problem(size: int | None, entry: Entry | None, n_seq: int) -> str | None:
    if size is None:
        return MISSING
    if entry is None:
        return f"is in no row of {TABLE}"
    if size != entry.n_bytes:
        return f"has {size:,} bytes instead of {entry.n_bytes:,}"
    if entry.n_seq != n_seq:
        return f"has {entry.n_seq} sequences instead of {n_seq} in {TABLE}"
    return None


def _checksum_damages(
    root: Place, manifest: Manifest, whole: dict[Key, Entry], report: CheckReport
) -> Iterator[Damage]:
    """Read every file in threads, which only move bytes, and yield the damaged ones."""
    arrays, given = all_arrays(manifest), text_names(manifest)
    total = sum(entry.n_bytes for entry in whole.values())
    n_done = 0
    report(Checked(0, total))
    pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix="lorsa-verify")
    try:
        reads = {
            pool.submit(
                read_checksum, arrays[name].shard_path(root, shard), manifest.shard_seqs
            ): entry
            for (shard, name), entry in whole.items()
        }
        for read in as_completed(reads):
            entry = reads[read]
            path = arrays[entry.array].shard_path(root, entry.shard)
            problem = _read_problem(read, entry, path)
            if problem is not None:
                fix: Fix = "none" if entry.array in given else "harvest"
                yield Damage(name_of(root, path), problem, fix, entry.shard)
            n_done += entry.n_bytes
            report(Checked(n_done, total))
    finally:
        pool.shutdown(cancel_futures=True)


def _read_problem(read: Future[int], entry: Entry, path: Place) -> str | None:
    try:
        with reading(path):
            same = read.result() == entry.crc32c
        return None if same else "is whole, but not the file that was committed (checksum)"
    except DamageError:
        return "is damaged (checksum)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
