"""Facts of a store: what is in it, without reading it; imports no torch.

    facts = StoreFacts.open("acts")
    facts.layers, facts.manifest.uuid, facts.mean_norm(Site(12, "attn_in"))

Opening checks the format version, the arrays' shapes, and that every file of shards.parquet exists
with its size, so that a damaged copy is found before the first step.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ..errors import DamageError, StoreError
from ..sites import Site
from .arrays import all_arrays, is_int8, site_arrays, summed
from .entries import Cells, Entries, Entry
from .folder import (
    is_complete,
    lost_files,
    require_agreement,
    resume_command,
    why_not_a_store,
    written_again,
)
from .manifest import MANIFEST, Manifest, read_manifest
from .places import Place, file_size, place
from .schema import require_shapes
from .site_facts import scale_of
from .spelling import ATTENTION, names_of, spell_sites
from .table import read_table


class TokenScales(NamedTuple):
    """Sizes of the scales of int8 tokens; a token with a huge outlier has a huge scale."""

    mean: float
    largest: float


class StoreFacts:
    """What a store, finished or not, says of its text, layers and files."""

    def __init__(self, root: Place, manifest: Manifest, entries: Entries) -> None:
        """Take what was read of a store; `open` reads it.

        Args:
            root: place of the store.
            manifest: its facts.
            entries: its committed files.
        """
        self.root = root
        self.manifest = manifest
        self._arrays = all_arrays(manifest)
        self._entries = entries.only(self._arrays.__contains__)
        """Committed files, but for those of layers that are being added or removed"""

    @classmethod
    def open(cls, root: str | Place) -> Self:
        """Open a store: its folder, or s3://bucket/folder.

        Args:
            root: place of the store.

        Raises:
            StoreError: no store, an unfinished one, another format version, files missing or cut.
        """
        root = place(root)
        if not is_complete(root):
            raise StoreError(why_not_a_store(root))
        manifest = read_manifest(root / MANIFEST)
        require_agreement(root, manifest)
        require_shapes(root, manifest)
        store = cls(root, manifest, read_table(root, manifest))
        store._check_files()
        return store

    @property
    def sites(self) -> list[Site]:
        """Sites in the store, stored or derived, by layer."""
        return sorted(self.manifest.sites, key=lambda site: site.place)

    @property
    def layers(self) -> list[int]:
        """Layers in the store, ascending."""
        return self.manifest.layers

    def has(self, site: Site) -> bool:
        """Return whether a site is in the store, stored or derived."""
        return site in self.manifest.sites

    def is_stored(self, site: Site) -> bool:
        """Return whether a site's activations are on disk; otherwise they are derived."""
        self.require_sites([site])
        return self.manifest.sites[site].is_stored

    def width(self, site: Site) -> int:
        """Return the width of a site's activations."""
        self.require_sites([site])
        return self.manifest.sites[site].width

    @property
    def train_seqs(self) -> npt.NDArray[np.int64]:
        """Sequences to train on, ascending."""
        return self._seqs(held_out=False)

    @property
    def held_out_seqs(self) -> npt.NDArray[np.int64]:
        """Sequences kept for validation, ascending."""
        return self._seqs(held_out=True)

    @property
    def entries(self) -> Collection[Entry]:
        """Committed files, ordered by shard and array."""
        return self._entries.values()

    @property
    def total_bytes(self) -> int:
        """Bytes of all committed files."""
        return self._entries.n_bytes

    def n_bytes(self, sites: Iterable[Site]) -> int:
        """Return the bytes of some sites' arrays on disk; a shared one counts once."""
        names = [spec.name for spec in site_arrays(self.manifest, sites)]
        return sum(int(self._entries.of(name)[1]["n_bytes"].sum()) for name in names)

    def n_nonfinite(self, site: Site) -> int:
        """Return the number of tokens of a site with NaN or Inf."""
        self.require_sites([site])
        _, rows = self._entries.of(summed(self.manifest, site))
        return int(rows["n_nonfinite"].sum())

    def mean_norm(self, site: Site) -> float:
        """Return the mean norm of a site's activations over the tokens of the training shards."""
        self.require_sites([site])
        shards, rows = self._entries.of(summed(self.manifest, site))
        return self._mean(rows[~np.isin(shards, self.manifest.held_out_shards)])

    def scales(self, site: Site) -> TokenScales | None:
        """Return the sizes of a site's token scales; None where it is not stored as int8."""
        self.require_sites([site])
        if not is_int8(self.manifest, site):
            return None
        _, rows = self._entries.of(scale_of(site.path))
        return TokenScales(self._mean(rows), float(rows["max_scale"].max(initial=0.0)))

    def require_sites(self, sites: Iterable[Site]) -> None:
        """Raise StoreError, which names the harvest that adds them, unless all sites are there."""
        lacking = [site for site in sites if site not in self.manifest.sites]
        if not lacking:
            return
        named = {*names_of(self.sites), *names_of(lacking)} != set(ATTENTION)
        have, asked = (spell_sites(some, named=named) for some in (self.sites, lacking))
        raise StoreError(f"{asked} is not in {self.root}; it has {have}; {self.adding(lacking)}")

    def adding(self, sites: Collection[Site], *, word: str = "it") -> str:
        """Return what to type to add sites, which a word stands for."""
        if self.manifest.request.get("merged"):
            return f"harvest {word} into each of the stores that it was merged from"
        again = resume_command(self.root, self.manifest, sorted(sites, key=lambda s: s.place))
        return f"add {word} with: {again}"

    def _mean(self, rows: Cells) -> float:
        """Return the mean norm or scale over the tokens of some files of one array."""
        n_tokens = sum(rows["n_seq"].tolist()) * self.manifest.n_ctx
        total = float(sum(rows["norm_sum"].tolist()))  # in order: the same to the last bit
        return total / float(max(n_tokens, 1))

    def _seqs(self, *, held_out: bool) -> npt.NDArray[np.int64]:
        seqs = np.arange(self.manifest.n_seq)
        is_held_out = np.isin(seqs // self.manifest.shard_seqs, self.manifest.held_out_shards)
        chosen: npt.NDArray[np.int64] = seqs[is_held_out == held_out]
        return chosen

    def _check_files(self) -> None:
        """Raise StoreError unless every file is in the table and exists with its size."""
        whole = self._entries.whole(self.manifest.n_shards, self._arrays)
        lost = lost_files(self.root, self._arrays, self._entries)
        bad = {*np.flatnonzero(~whole).tolist()[:1], *(shard for shard, _ in lost)}
        if not bad:
            return
        first = min(bad)
        for name, spec in self._arrays.items():
            path = spec.shard_path(self.root, first)
            if (first, name) not in self._entries:
                raise DamageError(f"{path} is in no row of shards.parquet; harvest again")
            if (first, name) in lost:
                self._refuse(path, file_size(path), self._entries[first, name])

    def _refuse(self, path: Place, size: int | None, entry: Entry) -> None:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.n_bytes:,}"
        remedy = written_again(self.root, self.manifest, entry.array)
        raise DamageError(f"{path} {found}; {remedy}, or restore a copy")
