"""A session writes one shard: batches in, committed files out."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial

from torch import Tensor

from ...errors import StoreError
from ...sites import Site
from ..arrays import site_arrays, together
from ..bucket import BucketPath
from ..encoding import blosc
from ..entries import Entry
from ..manifest import Manifest
from ..places import Place
from ..shard import ShardWriter, publish
from .encode import EncodedSites, ShardSums, encode_sites
from .write_queue import WriteQueue


class ShardSession:
    """Takes the sequences of one shard; a thread writes them while the model computes."""

    def __init__(
        self,
        root: Place,
        manifest: Manifest,
        shard: int,
        *,
        given: Iterable[Site],
        sites: Iterable[Site],
        queue: WriteQueue,
        channels: dict[str, Tensor],
        keep_nonfinite: bool,
        record: Callable[[list[Entry]], None],
    ) -> None:
        """Use `StoreWriter.shard`; batches have sites `given`, of which `sites` are written."""
        self.shard = shard
        self._manifest = manifest
        self._rows = manifest.shard_rows(shard)
        self._given = set(given)
        self._groups = dict.fromkeys(tuple(together(manifest, site)) for site in sites)
        self._specs = {
            spec.name: spec for group in self._groups for spec in site_arrays(manifest, group)
        }
        self._root = root
        self._queue = queue
        self._channels = channels
        self._keep_nonfinite = keep_nonfinite
        self._record = record
        self._files: dict[str, ShardWriter] = {}
        self._sums = {name: ShardSums() for name in self._specs}
        self._n_appended = 0
        self._committed: Future[list[Entry] | None] = Future()

    def append(self, batch: Mapping[Site, Tensor]) -> None:
        """Take the next sequences.

        Args:
            batch: activations of each of the writer's `sites_to_write`, [n, n_ctx, width]; sites
                that this shard has already are skipped.

        Raises:
            ValueError: the sites are others, or the shapes not those of the store.
            StoreError: earlier values were not finite, or the disk did not take them.
        """
        n_seqs = self._require_fit(batch)
        first = self._rows.start + self._n_appended
        for group in self._groups:
            n_bytes = n_seqs * sum(s.row_bytes for s in site_arrays(self._manifest, group))
            held = n_bytes * (1 if self._manifest.compression == "none" else 2)
            self._queue.reserve(held)
            values = {site: batch[site] for site in group}
            encoded = encode_sites(self._manifest, values, self._channels)
            self._queue.submit(partial(self._write, encoded, first), held)
        self._n_appended += n_seqs

    def finish(self) -> None:
        """Queue the commit of the shard after all that was appended."""
        n_seqs = len(self._rows)
        if self._n_appended != n_seqs:
            raise ValueError(
                f"shard {self.shard} has {n_seqs} sequences; {self._n_appended} were appended"
            )
        self._committed = self._queue.submit(self._commit, 0)

    @property
    def is_done(self) -> bool:
        """Whether the shard is committed."""
        return self._committed.done() and self._committed.result() is not None

    def entries(self) -> list[Entry]:
        """Wait for the commit and return its journal entries; raises the error of a failed one."""
        try:
            entries = self._committed.result()
            if entries is None:
                self._queue.raise_failure()
                raise StoreError(f"shard {self.shard} of {self._root} was not written")
        except BaseException:
            self.discard()
            raise
        return entries

    def _commit(self) -> list[Entry]:
        """Flush the files, rename them to their places, and record them in the journal.

        In the thread.
        """
        # a disk takes one file after the other; uploads wait for the network, all at once
        each = self._queue.pool.map if isinstance(self._root, BucketPath) else map
        files = list(each(ShardWriter.commit, self._files.values()))
        publish(file.path for file in self._files.values())
        entries = []
        for name, done in zip(self._files, files, strict=True):
            facts = self._sums[name].facts()
            entries.append(
                Entry(self.shard, name, len(self._rows), done.n_bytes, done.crc32c, **facts)
            )
        if entries:
            self._record(entries)
        return entries

    def discard(self) -> None:
        """Remove the files that were begun."""
        self._queue.reset()
        for file in self._files.values():
            file.discard()

    def _require_fit(self, batch: Mapping[Site, Tensor]) -> int:
        """Return the number of sequences of a batch that fits the store."""
        if batch.keys() != self._given:
            have, want = (", ".join(map(str, sorted(some))) for some in (batch, self._given))
            raise ValueError(f"the batch has {have}; to write: {want}")
        n_seqs = len(next(iter(batch.values())))
        for site, values in batch.items():
            expected = (n_seqs, self._manifest.n_ctx, self._manifest.sites[site].width)
            if values.shape != expected:
                raise ValueError(f"{site} must be {list(expected)}; it is {list(values.shape)}")
        if self._n_appended + n_seqs > len(self._rows):
            raise ValueError(
                f"shard {self.shard} has {len(self._rows)} sequences; "
                f"{self._n_appended + n_seqs} were appended"
            )
        return n_seqs

    def _write(self, encoded: EncodedSites, first_seq: int) -> None:
        """Write sites of a batch in the thread, which only moves bytes; see `loader` for why."""
        arrays = encoded.arrived()
        for site, n_bad in encoded.add_up(arrays, self._sums).items():
            if n_bad and not self._keep_nonfinite:
                raise StoreError(self._not_finite(site, n_bad, first_seq, encoded))
        for name, values in arrays.items():
            if name not in self._files:
                spec = self._specs[name]
                path = spec.shard_path(self._root, self.shard)
                self._files[name] = ShardWriter(
                    path,
                    n_chunks=self._manifest.shard_seqs,
                    codec=blosc(spec.compression, spec.itemsize),
                    each=self._queue.pool.map,
                )
            self._files[name].append(values)

    def _not_finite(self, site: Site, n_bad: int, first_seq: int, encoded: EncodedSites) -> str:
        seq = first_seq + encoded.first_nonfinite(site)
        where = f"{site.path} of sequence {seq}"
        count = f"{n_bad} such tokens in a batch of {encoded.n_seqs} sequences"
        if encoded.came_finite(site):
            return (
                f"{where} does not fit {self._manifest.dtype} ({count}); use --dtype bfloat16, "
                "into a new --store"
            )
        return (
            f"{where} is not finite (NaN or Inf from the model; {count}); go on and keep them: the "
            "same command with --keep-nonfinite; or try --model-dtype float32, into a new --store"
        )
