"""Reading other tools' checkpoints: settings by name and tensors, and no code of theirs.

Only a folder's own files are opened, under fixed names: nothing that a config says is taken for a
path. Pickled files are read as tensors alone; one that would run code is refused.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...errors import CheckpointError
from ..checkpoint_files import MOST_NAMED, require_floats, shown, shown_name
from ..lorsa.config import LorsaConfig
from ..lorsa.units import rescale_

LARGEST = 2**24
"""Largest width or number of heads: far above any there is, and small enough to compute with."""
BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
"""Tensors in their files that follow from the settings."""
_REQUIRED: Any = object()


class Settings:
    """Settings of another tool's config.json, which are taken out one by one."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self._left = dict(content)

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """Return a setting; null is the default.

        Raises:
            CheckpointError: it is missing without a default, or of another kind.
        """
        value = self._left.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.path} has no {name}")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            meant = kinds[0].__name__
            raise CheckpointError(f"{self.path}: {name} is {shown(value)}; {meant} is meant")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {name} is {value}")
        if isinstance(value, int) and abs(value) > 2**53:
            raise CheckpointError(f"{self.path}: {name} is {shown(value)}; no such number is meant")
        return value

    def size(self, name: str) -> int:
        """Return a width, length or number of heads; CheckpointError if it is out of range."""
        value: int = self.take(name, int)
        if not 1 <= value <= LARGEST:
            raise self.refuse(name, value, f"allowed: 1..{LARGEST}")
        return value

    def above_zero(self, name: str, default: Any = _REQUIRED) -> float:
        """Return a number above 0; CheckpointError if it is not."""
        value = self.take(name, (float, int), default)
        if value <= 0:
            raise self.refuse(name, value, "allowed: above 0")
        return float(value)

    def refuse(self, name: str, value: Any, why: str) -> CheckpointError:
        """Return the error for a setting that a Lorsa of ours cannot express."""
        return CheckpointError(f"{self.path}: {name} is {shown(value)}, {why}")

    def require(self, name: str, allowed: Any, why: str) -> None:
        """Take a setting out that can have one value only, or be absent.

        Raises:
            CheckpointError: it has another.
        """
        value = self._left.pop(name, None)
        if value is not None and value != allowed:
            raise self.refuse(name, value, why)

    def drop(self, *names: str) -> None:
        """Take out settings that change nothing here."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raise CheckpointError if a setting is left that is on: its effect is not known here."""
        left = [f"{shown_name(n)} = {shown(value)}" for n, value in self._left.items() if value]
        if left:
            more = ", ..." if len(left) > MOST_NAMED else ""
            raise CheckpointError(
                f"{self.path} has settings that lorsa does not know: "
                f"{', '.join(left[:MOST_NAMED])}{more}"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from .safetensors, .pt or .pth, onto the CPU.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_zipfile(path):
            with ZipFile(path) as archive:
                if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, as torch.save never does")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again") from None
    except Exception as error:  # whatever an unpickler meets
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} is refused: it is damaged or holds more than tensors ({reason[:120]})"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("sae"), dict):
        content = content["sae"]
    if not isinstance(content, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()
    ):
        raise CheckpointError(f"{path} does not hold tensors by name")
    for name, tensor in content.items():
        if not _is_plain(tensor):
            raise CheckpointError(f"{path}: {shown_name(name)} is no plain tensor of numbers")
    return dict(content)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is a full array in memory; .pt files can hold others."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    held = tensor.untyped_storage().nbytes() if tensor.device.type == "cpu" else 0
    return held >= tensor.nbytes  # or one number stands for many


def require_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a weight is not of floating dtype, or NaN."""
    require_floats(path, tensors)
    for name, tensor in tensors.items():
        if bool(tensor.isnan().any()):
            raise CheckpointError(f"{path}: {name} holds NaN; there is nothing to compute with it")


def config_of_settings(settings: Settings, **fields: Any) -> LorsaConfig:
    """Return a LorsaConfig; CheckpointError names the file and what is wrong in it."""
    try:
        return LorsaConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{settings.path} does not describe a Lorsa: {error}") from None


def unscale_(
    settings: Settings, ours: Mapping[str, Tensor], c: LorsaConfig, norms: list[tuple[str, float]]
) -> None:
    """Change weights in place, of activations scaled to a mean norm of sqrt(d_model), to raw ones.

    Args:
        settings: that the Lorsa is of.
        ours, c: its parameters by name, and its config.
        norms: names and values of the mean norms of x and of y, as they were measured.

    Raises:
        CheckpointError: a norm is no positive number, as where it was never measured.
    """
    for name, norm in norms:
        if not (math.isfinite(norm) and norm > 0):
            raise CheckpointError(
                f"{settings.path}: {shown_name(name)} is {norm}; a mean norm above 0 is meant"
            )
    x_scale, y_scale = (math.sqrt(c.d_model) / norm for _, norm in norms)
    rescale_(ours, c, 1 / x_scale, 1 / y_scale)
