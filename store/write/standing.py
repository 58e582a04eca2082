"""How far a store is, to one that writes it: what the journal tells, and which files are not there.

Other processes write the same store, so all this is of the last look. It may be behind what is so;
under the claim of a shard, another look tells all there is of that shard.
"""

from collections.abc import Iterable

from ...errors import StoreError
from ..folder import lost_files
from ..journal import Entry, Key, read_table, tell
from ..layout import all_arrays, layer_arrays
from ..manifest import MANIFEST, Manifest, read_manifest
from ..places import Place, file_size


class Standing:
    """What is committed of a store and what it lacks."""

    def __init__(self, root: Place, manifest: Manifest) -> None:
        """Look at it."""
        self._root = root
        self._manifest = manifest
        self._arrays = all_arrays(manifest)
        self.look()

    def look(self) -> None:
        """Read the journal, and see which of the files are not there."""
        self.read()
        self._lost = lost_files(self._root, self._arrays, self._told.entries)

    def read(self) -> None:
        """Read the journal alone."""
        self._told = tell(self._root)

    def add(self, entries: list[Entry]) -> None:
        """Count on files that this process has just committed."""
        self._told.entries.update({(e.shard, e.array): e for e in entries})

    @property
    def entries(self) -> dict[Key, Entry]:
        """The committed files."""
        return self._told.entries

    def rows(self) -> list[Entry]:
        """Return those of the store's arrays: the rows of its table."""
        return sorted(e for e in self.entries.values() if e.array in self._arrays)

    def spoken_of(self, keys: Iterable[Key]) -> bool:
        """Tell whether the journal has a word on some files, though it be that they are dropped."""
        return not self._told.spoken_of.isdisjoint(keys)

    def lacks(self, shard: int, layers: Iterable[int]) -> list[int]:
        """Return those of some layers of which a file of this shard is missing."""
        return [layer for layer in layers if not self._has(shard, layer)]

    def lacking(self, layers: Iterable[int]) -> list[int]:
        """Return the shards that lack some of these layers."""
        each = list(layers)
        return [shard for shard in range(self._manifest.n_shards) if self.lacks(shard, each)]

    def is_finished(self) -> bool:
        """Tell whether table and manifest say all there is."""
        try:
            manifest, rows = read_manifest(self._root / MANIFEST), read_table(self._root)
        except StoreError:
            return False
        return (manifest, sorted(rows)) == (self._manifest, self.rows())

    def _has(self, shard: int, layer: int) -> bool:
        for spec in layer_arrays(self._manifest, layer):
            key = shard, spec.name
            entry = self.entries.get(key)
            if entry is None:
                return False
            if key in self._lost and entry.n_bytes != file_size(
                spec.shard_path(self._root, shard)  # which another may have written since
            ):
                return False
        return True
