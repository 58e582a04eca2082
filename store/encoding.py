"""Encoding of values as bytes: logical dtypes, int8 with its scales, the codec of a chunk.

bfloat16 is no Zarr data type, so its bits are stored as uint16 and the array's attribute
`lorsa_dtype` says what they mean. int8 activations have two scales:

    x[t, c] = values[t, c] * scale[t] * channel[c],    values in -127..127

`channel` is the largest |x[., c]| in a sample of the site, once for the whole store. It is at
least 1/64 of the median channel's, because a channel that is quiet in the sample may be loud later.
A few channels of a language model's activations are tens of times larger than the rest; without
`channel` they would decide how coarsely all others are rounded. `scale` is a token's largest
|x[t, c] / channel[c]| / 127.
"""

from typing import NamedTuple

import torch
from numcodecs import Blosc
from torch import Tensor

from .arrays import DISK_DTYPES, DiskArray
from .choices import COMPRESSION_LEVELS

INT8_LARGEST = 127
QUIETEST = 1 / 64
"""Least scale of a channel, as a fraction of the median channel's."""


DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DISK_DTYPES}
"""Logical dtypes, as torch computes with them."""


class Encoded(NamedTuple):
    """Activations in the store's dtype, with the scales that decode them."""

    values: Tensor
    """[n, n_ctx, width]"""
    scale: Tensor | None = None
    """Scale of every token, float32, [n, n_ctx]; None unless the values are int8."""
    channel: Tensor | None = None
    """Scale of every channel, float32, [width]; None unless the values are int8."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Encoded":
        """Return a copy on a device; int8 is copied as int8."""
        parts = (None if p is None else p.to(device, non_blocking=non_blocking) for p in self)
        return Encoded(*parts)  # type: ignore[arg-type]

    def decode(self) -> Tensor:
        """Return the activations: float32 for int8, otherwise the values as they are."""
        if self.scale is None or self.channel is None:
            return self.values
        return (self.values * self.scale[..., None]).mul_(self.channel)  # [n, n_ctx, width]


def encode(values: Tensor, dtype: str, channel: Tensor | None = None) -> Encoded:
    """Round activations to a logical dtype, on their device, into new memory.

    Args:
        values: [n, n_ctx, width].
        dtype: one of ACTIVATION_DTYPES.
        channel: scale of every channel for int8, [width], above 0.

    Returns:
        Values and, for int8, scales; a token that is not finite has a scale that is not.
    """
    values = values.detach()
    if dtype != "int8":
        return Encoded(values.to(DTYPES[dtype], copy=True))
    assert channel is not None
    channel = channel.to(values.device)
    wide = values / channel
    scale = wide.abs().amax(dim=-1) / INT8_LARGEST  # [n, n_ctx]
    wide /= torch.where(scale == 0, 1, scale)[..., None]
    return Encoded(wide.round_().to(torch.int8), scale, channel)


def channel_scale(sample: Tensor) -> Tensor:
    """Return int8's scale of every channel: its largest finite absolute value.

    It is at least QUIETEST of the median scale of the channels that are not 0.

    Args:
        sample: activations, [..., width].

    Returns:
        float32, [width], above 0: 1 if all of the sample is 0 or not finite.
    """
    sizes = sample.detach().float().reshape(-1, sample.shape[-1]).abs()
    largest = torch.where(sizes.isfinite(), sizes, 0.0).amax(dim=0)  # [width]
    heard = largest[largest > 0]
    if not len(heard):
        return torch.ones_like(largest)
    tiny = torch.finfo(torch.float32).tiny
    return largest.clamp_min((heard.median() * QUIETEST).clamp_min(tiny))


def to_disk(values: Tensor, dtype: str) -> DiskArray:
    """Return a copy of a tensor, rounded to the logical dtype, as it lies on disk."""
    cast = values.detach().to("cpu", DTYPES[dtype], copy=True).contiguous()
    return disk_view(cast)


def disk_view(values: Tensor) -> DiskArray:
    """Return a tensor as it lies on disk, sharing its memory."""
    array: DiskArray = (
        values.view(torch.uint16) if values.dtype is torch.bfloat16 else values
    ).numpy()
    return array


def from_disk(values: DiskArray, dtype: str) -> Tensor:
    """Return an array from the disk as a tensor of the logical dtype, sharing its memory."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def blosc(compression: str, itemsize: int) -> Blosc | None:
    """Return the codec of a chunk's bytes, lossless; None for "none".

    Bits are shuffled, except for int8: all its bits are equally random, and only whole values
    compress.
    """
    if compression == "none":
        return None
    level = COMPRESSION_LEVELS[compression]
    shuffle = Blosc.BITSHUFFLE if itemsize > 1 else Blosc.NOSHUFFLE
    return Blosc(cname=compression, clevel=level, shuffle=shuffle, typesize=itemsize)
