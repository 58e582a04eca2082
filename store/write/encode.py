"""Encoding of a batch for the disk: rounding, norms, sums, and a search for NaN and Inf.

Arithmetic runs on the device of the activations. The copy to the host starts at once; the thread
that writes waits for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...sites import Site
from ..arrays import DiskArray, NormsAt, is_int8, norms_at, summed
from ..encoding import disk_view, encode
from ..manifest import Manifest
from ..site_facts import PAIR, scale_of


@dataclass(slots=True)
class ShardSums:
    """Sums over a shard of an array; the fields are those of an `Entry`."""

    norm_sum: float = 0.0
    square_sum: float = 0.0
    n_nonfinite: int = 0
    max_scale: float = 0.0

    def add(self, sizes: DiskArray) -> int:
        """Add norms or scales of tokens, [n, n_ctx]; return the number that is not finite."""
        good = np.isfinite(sizes)
        wide = sizes[good].astype(np.float64)
        n_bad = sizes.size - wide.size
        self.norm_sum += float(wide.sum())
        self.square_sum += float(np.square(wide).sum())
        self.n_nonfinite += n_bad
        return n_bad

    def add_scales(self, scales: DiskArray) -> None:
        """Add scales of int8 tokens; the array of the activations counts those not finite."""
        self.add(scales)
        self.n_nonfinite = 0
        finite = scales[np.isfinite(scales)]
        self.max_scale = max(self.max_scale, float(finite.max(initial=0.0)))

    def facts(self) -> dict[str, Any]:
        """Return the sums as fields of a journal entry."""
        return asdict(self)


def sums_of(manifest: Manifest, name: str, read: Callable[[str], DiskArray]) -> ShardSums:
    """Return the sums that a harvest has made over a shard of an array of a site.

    Args:
        manifest: facts of the store.
        name: path of the array in the store.
        read: function from the path of an array of that layer to its values in this shard.
    """
    sums = ShardSums()
    for site in manifest.sites:
        if name == summed(manifest, site):
            array, column = norms_at(manifest, site)
            norms = read(array)
            sums.add(norms if column is None else norms[..., column])
        elif name == scale_of(site.path) and is_int8(manifest, site):
            sums.add_scales(read(name))
    return sums


class EncodedSites(NamedTuple):
    """Arrays of sites that are written together, rounded and on their way to the host."""

    arrays: dict[str, Tensor]
    """Values in the dtype of the disk, by name of the array"""
    finite: dict[Site, Tensor]
    """Whether all values were finite before they were rounded, by site, bool, []"""
    manifest: Manifest
    event: Any
    """CUDA event of the copy to the host; None on a CPU"""

    @property
    def n_seqs(self) -> int:
        """Sequences of the batch."""
        return len(next(iter(self.arrays.values())))

    def arrived(self) -> dict[str, DiskArray]:
        """Wait for the copy to the host and return the arrays as they lie on disk."""
        if self.event is not None:
            self.event.synchronize()
        return {name: disk_view(values) for name, values in self.arrays.items()}

    def came_finite(self, site: Site) -> bool:
        """Return whether a site was finite before it was rounded."""
        return bool(self.finite[site].numpy())

    def first_nonfinite(self, site: Site) -> int:
        """Return the first sequence of the batch with a token of a site that is not finite."""
        return int((~np.isfinite(self._norms(site, self.arrived())).all(axis=1)).argmax())

    def add_up(self, arrays: dict[str, DiskArray], sums: dict[str, ShardSums]) -> dict[Site, int]:
        """Add the batch to the sums; return the number of tokens not finite, by site."""
        n_bad = {}
        for site in self.finite:
            n_bad[site] = sums[summed(self.manifest, site)].add(self._norms(site, arrays))
            if (scale := scale_of(site.path)) in arrays:
                sums[scale].add_scales(arrays[scale])
        return n_bad

    def _norms(self, site: Site, arrays: dict[str, DiskArray]) -> DiskArray:
        array, column = norms_at(self.manifest, site)
        return arrays[array] if column is None else arrays[array][..., column]


def encode_sites(
    manifest: Manifest, batch: Mapping[Site, Tensor], channels: dict[str, Tensor]
) -> EncodedSites:
    """Round activations to the store's dtype and start their copy to the host.

    Args:
        manifest: facts of the store.
        batch: activations of sites that are written together, [n, n_ctx, width] each; they may be
            overwritten as soon as this returns.
        channels: for int8, scale of every channel by array, float32, [width].
    """
    arrays: dict[str, Tensor] = {}
    finite: dict[Site, Tensor] = {}
    for site, values in batch.items():
        kept = values.detach()
        if manifest.sites[site].is_stored:
            encoded = encode(values, manifest.dtype, channels.get(site.path))
            arrays[site.path] = encoded.values
            if encoded.scale is not None:
                arrays[scale_of(site.path)] = encoded.scale
            kept = encoded.decode()
        sizes = torch.linalg.vector_norm(kept, dim=-1, dtype=torch.float32)  # [n, n_ctx]
        finite[site] = _all_finite(values, sizes)
        _put_norms(arrays, norms_at(manifest, site), sizes)
    arrays = {name: part.contiguous() for name, part in arrays.items()}
    event = None
    if values.is_cuda:
        arrays, finite, event = _to_host(arrays, finite, values.device)
    return EncodedSites(arrays, finite, manifest, event)


def _put_norms(arrays: dict[str, Tensor], at: NormsAt, sizes: Tensor) -> None:
    """Add norms of a site, [n, n_ctx], to the arrays; of a removed partner in a pair they are 0."""
    if at.column is None:
        arrays[at.array] = sizes
        return
    pair = arrays.pop(at.array, None)
    pair = sizes.new_zeros(*sizes.shape, len(PAIR)) if pair is None else pair
    pair[..., at.column] = sizes
    arrays[at.array] = pair  # the last of the pair's arrays


def _all_finite(values: Tensor, norms: Tensor) -> Tensor:
    """Return whether all values are finite, bool, [], given the norms of the rounded values."""
    if not values.is_cuda and bool(norms.isfinite().all()):
        return torch.tensor(True)  # spares a CPU the pass, which takes longer than all others
    return values.isfinite().all()


def _to_host(
    arrays: dict[str, Tensor], finite: dict[Site, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[Site, Tensor], Any]:
    """Copy to pinned memory in a separate stream, while the model computes.

    Returns:
        Arrays and flags on the host, valid once the event, the third value, is done.
    """
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for part in (*arrays.values(), *finite.values()):
            part.record_stream(stream)  # or its memory would be used again meanwhile
        on_host = {name: part.to("cpu", non_blocking=True) for name, part in arrays.items()}
        flags = {site: part.to("cpu", non_blocking=True) for site, part in finite.items()}
        event = torch.cuda.Event()
        event.record(stream)
    return on_host, flags, event


@cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
