"""From what the model computed to what is written: rounding, norms, sums, the finite and the other.

Arithmetic is done where the activations are, a GPU's on the GPU; the copy to the host is begun at
once and waited for in the thread that writes.
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..encoding import DiskArray, disk_view, encode
from ..layout import attn_in, attn_out, norms, scale_of, summed
from ..manifest import Manifest


@dataclass(slots=True)
class ShardSums:
    """What is added up over a shard of an array; the fields are those of a journal entry."""

    norm_sum: float = 0.0
    square_sum: float = 0.0
    n_nonfinite: int = 0
    max_scale: float = 0.0

    def add(self, sizes: DiskArray) -> int:
        """Add norms or scales of tokens, [n, n_ctx]; return how many are not finite."""
        good = np.isfinite(sizes)
        wide = sizes[good].astype(np.float64)
        n_bad = sizes.size - wide.size
        self.norm_sum += float(wide.sum())
        self.square_sum += float(np.square(wide).sum())
        self.n_nonfinite += n_bad
        return n_bad

    def add_scales(self, scales: DiskArray) -> None:
        """Add scales of int8 tokens; those that are not finite are counted elsewhere."""
        self.add(scales)
        self.n_nonfinite = 0
        finite = scales[np.isfinite(scales)]
        self.max_scale = max(self.max_scale, float(finite.max(initial=0.0)))

    def facts(self) -> dict[str, Any]:
        """Return the sums as fields of a journal entry."""
        return asdict(self)


class EncodedLayer(NamedTuple):
    """One layer's part of a batch on its way to the disk."""

    arrays: dict[str, Tensor]
    """As they will lie on disk, by name"""
    finite: dict[str, Tensor]
    """Whether all values of x and y were finite before they were rounded, by array, bool, []"""
    norms_of: tuple[str, str]
    """The arrays whose sums the two columns of the norms belong to"""
    norms_name: str
    event: Any
    """Of a GPU: done once everything is on the host; None on a CPU"""

    @property
    def n_seqs(self) -> int:
        """Sequences of the batch."""
        return len(self.arrays[self.norms_name])

    def arrived(self) -> dict[str, DiskArray]:
        """Wait for the copy and return the arrays as they lie on disk."""
        if self.event is not None:
            self.event.synchronize()
        return {name: disk_view(values) for name, values in self.arrays.items()}

    def came_finite(self, name: str) -> bool:
        """Tell whether an array was finite before it was rounded."""
        return bool(self.finite[name].numpy())

    def first_nonfinite(self) -> int:
        """Return the first sequence of the batch with a token that is not finite."""
        bad = ~np.isfinite(self.arrays[self.norms_name].numpy()).all(axis=(1, 2))
        return int(bad.argmax())

    def add_up(self, arrays: dict[str, DiskArray], sums: dict[str, ShardSums]) -> dict[str, int]:
        """Add the batch to the sums; return the tokens of each array that are not finite."""
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
    """Round a layer's activations to the store's dtype and begin to copy them to the host.

    Args:
        manifest: of the store.
        layer: which.
        x, y: [n, n_ctx, d_model]; they may be overwritten as soon as this returns.
        channels: scale of every channel by array, for int8.
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
    """Tell whether all values are finite, bool, []; norms are those of the rounded values."""
    if not values.is_cuda and bool(norms.isfinite().all()):
        return torch.tensor(True)  # spares a CPU the pass, which takes longer than all others
    return values.isfinite().all()


def _to_host(
    arrays: dict[str, Tensor], finite: dict[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Copy to pinned memory in a stream of its own, while the model goes on computing.

    Returns:
        The host's tensors, which are not to be touched before the event.
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
