"""Adoption of whole shards that the journal does not list, into the journal."""

from collections.abc import Iterator

from ...errors import DamageError, StoreError, UnreachableError
from ...sites import Site
from ..arrays import ArraySpec, DiskArray, all_arrays
from ..entries import Entries, Entry
from ..manifest import Manifest
from ..places import Place, file_size
from ..read.rows import RowReader
from ..shard import NO_CHUNK, read_checksum, read_index
from ..unlisted import unlisted_shards
from ..write.encode import ShardSums, sums_of


def adopted(
    root: Place, manifest: Manifest, entries: Entries, sites: list[Site]
) -> Iterator[Entry]:
    """Yield entries of files that are whole and never mentioned; they are read for it.

    Args:
        root: place of the store.
        manifest: its facts.
        entries: what its journal lists, and what it no longer does.
        sites: sites to look at.
    """
    for shard, specs in unlisted_shards(root, manifest, entries, sites):
        try:
            yield from [_entry(root, manifest, spec, shard) for spec in specs]
        except UnreachableError:
            raise
        except StoreError:
            continue  # it is damaged, and written again


def _entry(root: Place, manifest: Manifest, spec: ArraySpec, shard: int) -> Entry:
    path, rows = spec.shard_path(root, shard), manifest.shard_rows(shard)
    n_chunks = int((read_index(path, manifest.shard_seqs)[:, 0] != NO_CHUNK).sum())
    if n_chunks != len(rows):
        raise DamageError(f"{path} has {n_chunks} sequences")
    crc = read_checksum(path, manifest.shard_seqs)
    sums = ShardSums()
    if spec.name.startswith("layers/"):
        sums = sums_of(manifest, spec.name, lambda name: _values(root, manifest, name, rows))
    return Entry(shard, spec.name, len(rows), file_size(path) or 0, crc, **sums.facts())


def _values(root: Place, manifest: Manifest, name: str, rows: range) -> DiskArray:
    spec = all_arrays(manifest)[name]
    reader = RowReader(root, spec, n_seq=manifest.n_seq, shard_seqs=manifest.shard_seqs)
    values: DiskArray = reader.read(rows).numpy()
    return values
