"""What a harvest will write, and whether it fits, before the model runs."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..store import DTYPES
from .config import HarvestConfig
from .errors import HarvestError

DEFAULT_MAX_TOKENS = 10_000_000
SHARD_FILE_BYTES = 512 << 20
"""Largest file of a shard."""
SHARD_BYTES = 8 << 30
"""Largest shard over all arrays, which bounds what a killed harvest has to redo."""
MIN_SHARDS = 20
"""So that the last 5 % of the shards can be held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Sizes of a harvest."""

    model: str
    """Id of the language model."""
    layers: dict[int, str]
    """Layers with the names of their attention modules."""
    n_ctx: int
    """Tokens in a sequence."""
    n_tokens: int
    """Tokens of the store."""
    bytes_per_token: int
    """Activations of all layers."""
    total_bytes: int
    """Of the store, before compression."""
    free_bytes: int
    """On the disk, besides what is there of this store."""
    first_tokens: str
    """Beginning of the first sequence, as text; empty when a harvest goes on."""


class Sizes:
    """Arithmetic of one request on one model: what a token costs and how many the disk takes."""

    def __init__(self, config: HarvestConfig, layers: dict[int, str], d_model: int) -> None:
        """Take the request, the layers with their modules' names, and the activations' width."""
        self._config = config
        self._layers = layers
        self.activation_bytes = 2 * len(layers) * d_model * DTYPES[config.dtype].itemsize
        self.token_bytes = self.activation_bytes + 8 * len(layers) + 8  # norms; id and document
        have = sum(p.stat().st_size for p in config.store.rglob("*") if p.is_file())
        self.free_bytes = shutil.disk_usage(_existing(config.store)).free + have

    def max_tokens(self) -> int:
        """Return how many tokens to harvest at most, in whole sequences.

        Raises:
            HarvestError: more are asked for than the disk takes.
        """
        fits_half = self.free_bytes // 2 // self.token_bytes
        n_tokens = self._config.tokens or min(DEFAULT_MAX_TOKENS, fits_half)
        n_ctx = self._config.n_ctx
        if n_tokens * self.token_bytes > self.free_bytes and not self._config.force:
            raise HarvestError(
                f"{n_tokens:,} tokens of {len(self._layers)} layers take "
                f"{n_tokens * self.token_bytes / 1e9:,.1f} GB; {self.free_bytes / 1e9:,.1f} GB are "
                f"free: use --tokens {fits_half // n_ctx * n_ctx}, fewer --layers, or --force"
            )
        return n_tokens // n_ctx * n_ctx

    def plan(self, model: str, n_tokens: int, first_tokens: str = "") -> Plan:
        """Return the plan for so many tokens."""
        return Plan(
            model=model,
            layers=self._layers,
            n_ctx=self._config.n_ctx,
            n_tokens=n_tokens,
            bytes_per_token=self.activation_bytes,
            total_bytes=n_tokens * self.token_bytes,
            free_bytes=self.free_bytes,
            first_tokens=first_tokens,
        )


def shard_seqs(n_seq: int, *, seq_bytes: int, n_arrays: int) -> int:
    """Return how many sequences a shard holds: a power of two.

    Args:
        n_seq: sequences of the store.
        seq_bytes: bytes of one sequence in one array.
        n_arrays: activation arrays of the store.
    """
    most = min(SHARD_FILE_BYTES, SHARD_BYTES // n_arrays) // seq_bytes
    most = max(1, min(most, n_seq // MIN_SHARDS))
    return int(1 << (most.bit_length() - 1))


def require_same_request(store: Path, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise HarvestError unless a store was begun with these settings."""
    different = [
        f"{name} was {begun.get(name)!r}, is {value!r}"
        for name, value in asked.items()
        if begun.get(name) != value
    ]
    if different:
        raise HarvestError(
            f"{store} holds another harvest ({'; '.join(different)}); "
            "give the same settings, or another folder by --store"
        )


def _existing(path: Path) -> Path:
    """Return the nearest folder on the way to a path that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
