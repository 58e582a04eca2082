"""Checksums that bind the two files of a checkpoint, in the header of its weights.

    __metadata__  {"format": "pt", "tensors_crc32c": "0a1b2c3d", "config_crc32c": "4e5f6071"}

Weights and a config.json of two checkpoints, or with a flipped bit in either, do not load. Weights
without sums, written before there were any or by another tool, are read as they are. Both sums are
of contents, so spaces in config.json and the order of tensors do not matter.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..seal import crc32c, hexadecimal, json_crc32c

PLAIN = {"format": "pt"}
"""Metadata that readers of safetensors expect of tensors of torch."""
TENSORS = "tensors_crc32c"
CONFIG_SUM = "config_crc32c"


def sums_of(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a checkpoint's weights.

    Args:
        content: what config.json holds.
        tensors: by name, of any device.
    """
    return {**PLAIN, TENSORS: tensors_crc32c(tensors), CONFIG_SUM: json_crc32c(content)}


def has_sums(found: Mapping[str, str] | None) -> bool:
    """Return whether the metadata of weights has sums."""
    return bool(found) and not {TENSORS, CONFIG_SUM}.isdisjoint(found or ())


def check_sums(
    weights: Path,
    config: Path,
    found: Mapping[str, str] | None,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Compare a checkpoint with its sums, if it has any.

    Args:
        weights: file with the tensors.
        config: file with the content.
        found: metadata of the weights.
        content: what config.json holds.
        tensors: all tensors of the weights.

    Raises:
        CheckpointError: the weights are damaged, or config.json is damaged or another's.
    """
    if not has_sums(found):
        return
    assert found is not None
    if found.get(TENSORS) != tensors_crc32c(tensors) or not PLAIN.items() <= found.items():
        raise CheckpointError(
            f"{weights} is damaged (its checksum is wrong); copy or train it again"
        )
    if found.get(CONFIG_SUM) != json_crc32c(content):
        raise CheckpointError(
            f"{config} is damaged, or not the one that {weights.name} was written with; copy both "
            "again from one place"
        )


def tensors_crc32c(tensors: Mapping[str, Tensor], start: int = 0) -> str:
    """Return the crc32c of tensors, after `start`: names, dtypes, shapes and bytes, by name."""
    crc = start
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        about = [name, str(tensor.dtype), list(tensor.shape)]
        crc = crc32c(json.dumps(about).encode(), crc)
        crc = crc32c(tensor.flatten().view(torch.uint8).numpy(), crc)
    return hexadecimal(crc)
