"""Reading of a finished store: any sequences of any array, each checked.

    store = ActivationStore.open("acts")
    x, y = store.activations(attention_ports(12), store.train_seqs[:8])     # [8, n_ctx, width]

Opening checks what facts.py says; each chunk's checksum is compared when it is read. A store may be
read by many threads and many processes.
"""

import numpy as np
from torch import Tensor

from ...errors import StoreError
from ...sites import Ports, Site
from .. import fixed
from ..arrays import is_int8, norms_at
from ..encoding import Encoded
from ..entries import Entries
from ..facts import StoreFacts
from ..manifest import Manifest
from ..open_files import OpenFiles
from ..places import Place
from ..site_facts import scale_of
from .derived import KnownNorms, norm_limit
from .rows import RowReader, Seqs
from .stored import Activations, Derive, Stored, stacked

MEDIAN_TOKENS = 1 << 20
"""Training tokens, at most, over which the median of the norms is taken."""


class ActivationStore(StoreFacts):
    """A finished store, open for reading."""

    def __init__(
        self,
        root: Place,
        manifest: Manifest,
        entries: Entries,
        files: OpenFiles | None = None,
    ) -> None:
        """Use `open`."""
        super().__init__(root, manifest, entries)
        n_seq, shard_seqs = manifest.n_seq, manifest.shard_seqs
        self._files = files = files or OpenFiles()
        self._readers = {
            name: RowReader(root, spec, n_seq=n_seq, shard_seqs=shard_seqs, files=files)
            for name, spec in self._arrays.items()
        }
        self._channels: dict[Site, Tensor] = {}
        self._medians: dict[Site, float] = {}

    @classmethod
    def open(cls, root: str | Place, files: OpenFiles | None = None) -> "ActivationStore":
        """Open a store: its folder, or s3://bucket/folder.

        Args:
            root: place of the store.
            files: open files, shared with other open stores, or None.

        Raises:
            StoreError: no store, an unfinished one, another format version, files missing or cut.
        """
        facts = StoreFacts.open(root)
        return cls(facts.root, facts.manifest, facts._entries, files)

    @property
    def bytes_read(self) -> int:
        """Bytes of chunks that were read so far through the open files of this store."""
        return self._files.bytes_read

    def tokens(self, seqs: Seqs) -> Tensor:
        """Return token ids, int32, [n, n_ctx]."""
        return self.read("tokens", seqs)

    def documents(self, seqs: Seqs) -> Tensor:
        """Return the number of the document that each token comes from, int32, [n, n_ctx]."""
        return self.read("documents", seqs)

    def document_names(self) -> list[str]:
        """Return the name of every document, by the number that `documents` gives."""
        return fixed.read_documents(self.root, self.manifest)

    def activations(self, ports: Ports, seqs: Seqs, derive: Derive | None = None) -> Activations:
        """Return what the ports read and write, of some sequences.

        Args:
            ports: sites to read; `attention_ports(12)` are what a Lorsa of layer 12 takes.
            seqs: sequences to read.
            derive: computes sites that are not stored, on the CPU in float32.

        Returns:
            x and y in the store's dtype, float32 for int8; all in float32 if a site was derived.

        Raises:
            StoreError: a site is not there, a file is damaged, or a site can only be derived, or
                comes out with other norms than the language model's.
        """
        stored = self.stored(ports, seqs)
        if not stored.known:
            return stacked(ports, {site: part.decode() for site, part in stored.parts.items()})
        if derive is None:
            raise StoreError(
                f"{self.root} does not store {next(iter(stored.known))}, which is derived; give "
                "activations(ports, seqs, derive) what lorsa.language.stored.deriver makes"
            )
        return stored.on("cpu", derive)

    def values(self, site: Site, seqs: Seqs, derive: Derive | None = None) -> Tensor:
        """Return a site's activations as `activations` does, [n, n_ctx, width]."""
        return self.activations(Ports((site,), (site,)), seqs, derive).x

    def stored(self, ports: Ports, seqs: Seqs) -> Stored:
        """Return what `activations` takes, encoded as in the store."""
        self.require_sites(ports.sites)
        parts = {site: self._encoded(site, seqs) for site in self.sources(ports)}
        known = {
            site: self.known_norms(site, self.norms(site, seqs)) for site in self.derived(ports)
        }
        return Stored(ports, parts, known)

    def derived(self, ports: Ports) -> list[Site]:
        """Return the sites of ports that are not stored, in order."""
        return [site for site in ports.sites if not self.manifest.sites[site].is_stored]

    def sources(self, ports: Ports) -> list[Site]:
        """Return the stored sites that it takes to have all sites of ports, in order."""
        found: set[Site] = set()
        for site in ports.sites:
            derived = self.manifest.sites[site].derived
            found.update([site] if derived is None else derived.sites)
        return sorted(found, key=lambda site: site.place)

    def known_norms(self, site: Site, norms: Tensor) -> KnownNorms:
        """Return norms [n, n_ctx] of a derived site as what it is checked with."""
        return KnownNorms(norms, norm_limit(self.manifest, site), f"{self.root}, {site}")

    def reader(self, name: str) -> RowReader:
        """Return the reader of an array, by its path in the store."""
        return self._readers[name]

    def channel(self, site: Site) -> Tensor | None:
        """Return the scale of every channel of int8 activations, None for other dtypes.

        Raises:
            StoreError: it is missing or damaged.
        """
        if not is_int8(self.manifest, site):
            return None
        if site not in self._channels:
            self._channels[site] = fixed.read_channel(self.root, self.manifest, site)
        return self._channels[site]

    def _encoded(self, site: Site, seqs: Seqs) -> Encoded:
        values, channel = self.read(site.path, seqs), self.channel(site)
        if channel is None:
            return Encoded(values)
        return Encoded(values, self.read(scale_of(site.path), seqs), channel)

    def norms(self, site: Site, seqs: Seqs) -> Tensor:
        """Return the norm of every token at a site, float32, [n, n_ctx]."""
        self.require_sites([site])
        array, column = norms_at(self.manifest, site)
        norms = self.read(array, seqs)
        return norms if column is None else norms[..., column]

    def median_norm(self, site: Site) -> float:
        """Return the median norm at a site over evenly spaced training sequences; inf if none.

        A few tokens of the residual stream are hundreds of times as long as the others. They lead
        the mean and not the median.
        """
        if site not in self._medians:
            seqs = self.train_seqs
            n_seqs = min(len(seqs), max(1, MEDIAN_TOKENS // self.manifest.n_ctx))
            some = self.norms(site, seqs[np.arange(n_seqs) * len(seqs) // max(n_seqs, 1)])
            self._medians[site] = float(np.median(some.numpy())) if n_seqs else float("inf")
        return self._medians[site]

    def weights(self, module: str) -> dict[str, Tensor]:
        """Return a module's own parameters by name: of 12.attention W_Q, W_K, W_V, W_O, b_Q, ...

        Raises:
            StoreError: the store knows no such module, or a file is missing or damaged.
        """
        if module not in self.manifest.modules:
            have = ", ".join(self.manifest.modules)
            raise StoreError(f"{self.root} has no weights of {module}; it has {have}")
        return fixed.read_weights(self.root, self.manifest, module)

    def read(self, name: str, seqs: Seqs) -> Tensor:
        """Read sequences of an array by its path in the store.

        Args:
            name: such as "tokens" or "layers/12/attn_in".
            seqs: sequence numbers in any order, 0..n_seq - 1.

        Returns:
            [n, *shape of a sequence], in the logical dtype.

        Raises:
            StoreError: a chunk is missing or damaged.
            IndexError: a sequence number is out of range.
        """
        return self._readers[name].read(seqs)
