"""How values become bytes: logical dtypes, and the codec of a chunk.

bfloat16 is no Zarr data type, so its bits are stored as uint16 and the array's attribute
`lorsa_dtype` says what they mean.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numcodecs import Blosc
from torch import Tensor

Array = npt.NDArray[Any]

COMPRESSION_LEVELS = {"lz4": 5, "zstd": 1}
COMPRESSIONS = ("none", *COMPRESSION_LEVELS)


class DType(NamedTuple):
    """A logical dtype: as torch computes with it, and as it lies on disk."""

    torch: torch.dtype
    disk: str
    """numpy and Zarr data type"""

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return np.dtype(self.disk).itemsize


DTYPES = {
    "bfloat16": DType(torch.bfloat16, "uint16"),
    "float16": DType(torch.float16, "float16"),
    "float32": DType(torch.float32, "float32"),
    "int32": DType(torch.int32, "int32"),
}
ACTIVATION_DTYPES = ("bfloat16", "float16", "float32")


def to_disk(values: Tensor, dtype: str) -> Array:
    """Round a tensor to the logical dtype and return a copy of it as it lies on disk."""
    cast = values.detach().to("cpu", DTYPES[dtype].torch, copy=True).contiguous()
    array: Array = (cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy()
    return array


def from_disk(values: Array, dtype: str) -> Tensor:
    """Return the tensor that an array from the disk stands for, sharing its memory."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def blosc(compression: str, itemsize: int) -> Blosc | None:
    """Return the codec of a chunk's bytes, lossless and bit-shuffled; None for "none"."""
    if compression == "none":
        return None
    level = COMPRESSION_LEVELS[compression]
    return Blosc(cname=compression, clevel=level, shuffle=Blosc.BITSHUFFLE, typesize=itemsize)
