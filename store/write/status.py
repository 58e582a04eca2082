"""Status of a store's shards, as a writer last read it: committed or missing.

Other processes write the same store, so the status may be out of date. Of a shard that this process
has claimed it is exact after the next read.
"""

from collections.abc import Iterable

from ...errors import StoreError, UnreachableError
from ...sites import Site
from ..arrays import all_arrays, site_arrays, together
from ..entries import Entries, Entry, Key
from ..folder import lost_files
from ..journal import Journal
from ..manifest import MANIFEST, Manifest, read_manifest
from ..places import Place, file_size
from ..table import read_table


class ShardStatus:
    """Committed files of a store and the shards that miss some."""

    def __init__(self, root: Place, manifest: Manifest) -> None:
        """Read the journal and compare it with the files."""
        self._root = root
        self._manifest = manifest
        self._arrays = all_arrays(manifest)
        self._of_site = {
            site: site_arrays(manifest, together(manifest, site)) for site in manifest.sites
        }
        """Arrays that are written with a site"""
        self._journal = Journal(root)
        self._missing: set[int] = set()
        self._changed: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read the journal and check which of its files exist."""
        self._journal.read()
        self._lost = lost_files(self._root, self._arrays, self.entries)
        before, self._missing = self._missing, set(self.missing_shards(self._manifest.sites))
        self._n_missing_seqs = sum(map(self._n_seqs, self._missing))
        self._changed |= before ^ self._missing

    def read(self) -> None:
        """Read the lines that were added to the journal; files are not checked."""
        self._update(self._journal.read())

    def read_entries(self) -> Entries:
        """Read the lines that were added; return the files that are committed."""
        self.read()
        return self.entries

    def take_changed(self) -> set[int]:
        """Return the shards that have changed since the last call."""
        found, self._changed = self._changed, set()
        return found

    def record(self, entries: list[Entry]) -> None:
        """Add files that this process has just committed."""
        self.entries.put(entries)
        self._update({entry.shard for entry in entries})

    @property
    def entries(self) -> Entries:
        """Files that are committed."""
        return self._journal.entries

    def rows(self) -> Entries:
        """Return the entries of the store's arrays: the rows of its table."""
        return self.entries.only(self._arrays.__contains__)

    def last_mention(self, keys: Iterable[Key]) -> str | None:
        """Return the name of the last journal file that mentions some files, None if none does."""
        return self._journal.last_mention(keys)

    def require_readable(self) -> None:
        """Raise StoreError, with what to type, if a line of the journal is damaged."""
        self._journal.require_readable()

    def missing_sites(self, shard: int, sites: Iterable[Site]) -> list[Site]:
        """Return the sites, out of some, that miss a file of this shard, or are written with one.

        In a store of format 1 these are the other site of the pair.
        """
        return [site for site in sites if not self._has(shard, site)]

    def missing_shards(self, sites: Iterable[Site]) -> list[int]:
        """Return the shards that lack some of these sites, ascending; it checks every shard."""
        each = list(sites)
        names = list(dict.fromkeys(spec.name for site in each for spec in self._of_site[site]))
        whole = self.entries.whole(self._manifest.n_shards, names)
        lost = {shard for shard, _ in self._lost}
        return [
            shard
            for shard, is_whole in enumerate(whole.tolist())
            if not is_whole or (shard in lost and self.missing_sites(shard, each))
        ]

    def n_missing_seqs(self, but: Iterable[int] = ()) -> int:
        """Return the number of sequences in shards that lack some site, without some shards."""
        own = self._missing.intersection(but)
        return self._n_missing_seqs - sum(map(self._n_seqs, own))

    def is_finished(self) -> bool:
        """Return whether table and manifest are written and complete."""
        try:
            manifest = read_manifest(self._root / MANIFEST)
            rows = read_table(self._root, manifest)
        except UnreachableError:
            raise
        except StoreError:
            return False
        return manifest == self._manifest and rows.to_arrow() == self.rows().to_arrow()

    def _update(self, shards: Iterable[int]) -> None:
        """Update which shards are missing, for shards that have changed."""
        for shard in shards:
            if shard < self._manifest.n_shards:
                self._changed.add(shard)
                self._set_missing(shard, bool(self.missing_sites(shard, self._of_site)))

    def _set_missing(self, shard: int, is_missing: bool) -> None:
        if is_missing and shard not in self._missing:
            self._missing.add(shard)
            self._n_missing_seqs += self._n_seqs(shard)
        elif not is_missing and shard in self._missing:
            self._missing.remove(shard)
            self._n_missing_seqs -= self._n_seqs(shard)

    def _n_seqs(self, shard: int) -> int:
        return len(self._manifest.shard_rows(shard))

    def _has(self, shard: int, site: Site) -> bool:
        for spec in self._of_site[site]:
            key = shard, spec.name
            if key not in self.entries:
                return False
            if key in self._lost and self.entries[key].n_bytes != file_size(
                spec.shard_path(self._root, shard)  # which another may have written since
            ):
                return False
        return True
