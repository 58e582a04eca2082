"""Encoding of a batch for the disk: rounding, norms, sums, and a search for NaN and Inf.

Arithmetic runs on the device of the activations. The copy to the host starts at once; the thread
that writes waits for it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arrays import DiskArray, attn_in, attn_out, norms, scale_of, sites, summed
from ..encoding import disk_view, encode
from ..manifest import Manifest


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
    """Return the sums that a harvest has made over a shard of an array of a layer.

    Args:
        manifest: facts of the store.
        name: path of the array in the store.
        read: function from the path of an array of that layer to its values in this shard.
    """
    layer = int(name.split("/")[1])
    sums, of_norms = ShardSums(), summed(manifest, layer)
    if name in of_norms:
        sums.add(read(norms(layer))[..., of_norms.index(name)])
    elif name in map(scale_of, sites(manifest, layer)):
        sums.add_scales(read(name))
    return sums


class EncodedLayer(NamedTuple):
    """Arrays of one layer of a batch, rounded and on their way to the host."""

    arrays: dict[str, Tensor]
    """Values in the dtype of the disk, by name of the array"""
    finite: dict[str, Tensor]
    """Whether all values of x and y were finite before they were rounded, by array, bool, []"""
    norms_of: tuple[str, str]
    """The arrays whose sums the two columns of the norms belong to"""
    norms_name: str
    event: Any
    """CUDA event of the copy to the host; None on a CPU"""

    @property
    def n_seqs(self) -> int:
        """Sequences of the batch."""
        return len(self.arrays[self.norms_name])

    def arrived(self) -> dict[str, DiskArray]:
        """Wait for the copy to the host and return the arrays as they lie on disk."""
        if self.event is not None:
            self.event.synchronize()
        return {name: disk_view(values) for name, values in self.arrays.items()}

    def came_finite(self, name: str) -> bool:
        """Return whether an array was finite before it was rounded."""
        return bool(self.finite[name].numpy())

    def first_nonfinite(self) -> int:
        """Return the first sequence of the batch with a token that is not finite."""
        bad = ~np.isfinite(self.arrays[self.norms_name].numpy()).all(axis=(1, 2))
        return int(bad.argmax())

    def add_up(self, arrays: dict[str, DiskArray], sums: dict[str, ShardSums]) -> dict[str, int]:
        """Add the batch to the sums; return the number of tokens not finite, by array."""
        n_bad = {}
        for name, sizes in zip(
            self.norms_of, np.moveaxis(arrays[self.norms_name], -1, 0), strict=True
        ):
            n_bad[name] = sums[name].add(sizes)
        for name in self.norms_of:
            if (scale := scale_of(name)) in arrays:
                sums[scale].add_scales(arrays[scale])
        return n_bad


def encode_layer(
    manifest: Manifest, layer: int, x: Tensor, y: Tensor, channels: dict[str, Tensor]
) -> EncodedLayer:
    """Round a layer's activations to the store's dtype and start their copy to the host.

    Args:
        manifest: facts of the store.
        layer: number of the layer.
        x, y: [n, n_ctx, d_model]; they may be overwritten as soon as this returns.
        channels: for int8, scale of every channel by array, float32, [d_model].
    """
    arrays: dict[str, Tensor] = {}
    token_norms, finite, norms_of = [], {}, summed(manifest, layer)
    sites = attn_in(layer), attn_out(layer)
    for name, site, values in zip(norms_of, sites, (x, y), strict=True):
        kept = values.detach()
        if name == site:  # it is stored
            encoded = encode(values, manifest.dtype, channels.get(site))
            arrays[site] = encoded.values
            if encoded.scale is not None:
                arrays[scale_of(site)] = encoded.scale
            kept = encoded.decode()
        sizes = torch.linalg.vector_norm(kept, dim=-1, dtype=torch.float32)  # [n, n_ctx]
        token_norms.append(sizes)
        finite[name] = _all_finite(values, sizes)
    arrays[norms(layer)] = torch.stack(token_norms, dim=-1)  # [n, n_ctx, 2]
    arrays = {name: part.contiguous() for name, part in arrays.items()}
    event = None
    if x.is_cuda:
        arrays, finite, event = _to_host(arrays, finite, x.device)
    return EncodedLayer(arrays, finite, norms_of, norms(layer), event)


def _all_finite(values: Tensor, norms: Tensor) -> Tensor:
    """Return whether all values are finite, bool, [], given the norms of the rounded values."""
    if not values.is_cuda and bool(norms.isfinite().all()):
        return torch.tensor(True)  # spares a CPU the pass, which takes longer than all others
    return values.isfinite().all()


def _to_host(
    arrays: dict[str, Tensor], finite: dict[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
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
        flags = {name: part.to("cpu", non_blocking=True) for name, part in finite.items()}
        event = torch.cuda.Event()
        event.record(stream)
    return on_host, flags, event


@cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
