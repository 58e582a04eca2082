"""What a harvest will write, and whether it fits, before the model runs."""

from dataclasses import dataclass, fields
from typing import Any

from ..store import DTYPES, Place, format_bytes, free_bytes, tree_bytes
from .config import HarvestConfig
from .errors import HarvestError

DEFAULT_MAX_TOKENS = 10_000_000
SHARD_FILE_BYTES = 512 << 20
"""Largest file of a shard."""
SHARD_BYTES = 8 << 30
"""Largest shard over all arrays, which bounds what a killed harvest has to redo."""
MIN_SHARDS = 20
"""So that 5 % of the shards can be held out."""
TOKEN_BYTES = 8
"""A token's id and document."""
SCALE_BYTES = 4
"""A token's scale in an int8 array."""
NORM_BYTES = 8
"""A token's norms in a layer."""


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
    n_documents: int | None
    """Documents that they come from; None when a harvest goes on."""
    bytes_per_token: int
    """Activations of all layers."""
    total_bytes: int
    """Of the store, before compression."""
    free_bytes: int | None
    """On the disk, besides what is there of this store; None for a bucket."""
    first_tokens: str
    """Beginning of the first sequence, as text; empty when a harvest goes on."""


def n_sites(config: HarvestConfig) -> int:
    """Return how many of x and y are stored."""
    return 1 if config.outputs == "derive" else 2


class Sizes:
    """Arithmetic of one request on one model: what a token costs and how many the disk takes."""

    def __init__(self, config: HarvestConfig, layers: dict[int, str], d_model: int) -> None:
        """Take the request, the layers with their modules' names, and the activations' width."""
        self._config = config
        self._layers = layers
        site_bytes = d_model * DTYPES[config.dtype].itemsize
        site_bytes += SCALE_BYTES if config.dtype == "int8" else 0
        self.activation_bytes = n_sites(config) * len(layers) * site_bytes
        self.token_bytes = self.activation_bytes + NORM_BYTES * len(layers) + TOKEN_BYTES
        # W_Q, W_K, W_V and W_O in float32, if all are square
        self.weight_bytes = 4 * len(layers) * d_model * d_model * DTYPES["float32"].itemsize
        free = free_bytes(config.store)
        self.free_bytes = None if free is None else free + tree_bytes(config.store)

    def _fits_half(self) -> int:
        """Return the tokens that half of the free disk takes; a bucket takes any number."""
        if self.free_bytes is None:
            return DEFAULT_MAX_TOKENS
        return max(0, (self.free_bytes // 2 - self.weight_bytes) // self.token_bytes)

    def max_tokens(self) -> int:
        """Return how many tokens to harvest at most, in whole sequences.

        Raises:
            HarvestError: the disk does not take so many, or they are no two sequences.
        """
        n_ctx = self._config.n_ctx
        n_tokens = self._config.tokens or min(DEFAULT_MAX_TOKENS, self._fits_half())
        if self._config.tokens is not None and n_tokens < 2 * n_ctx:
            raise HarvestError(
                f"{n_tokens} tokens do not make two sequences of {n_ctx} (one to train, "
                "one to test): use a larger --tokens or a smaller --n-ctx"
            )
        if n_tokens < 2 * n_ctx and self.free_bytes is not None:
            raise HarvestError(
                f"{format_bytes(self.free_bytes)} free on the disk are too few for a store of "
                f"{len(self._layers)} layers; make room, or choose another disk by --store"
            )
        self.require_room(n_tokens)
        return n_tokens // n_ctx * n_ctx

    def require_room(self, n_tokens: int) -> None:
        """Raise HarvestError unless the disk takes so many tokens, or --force was given."""
        needed = n_tokens * self.token_bytes + self.weight_bytes
        if self.free_bytes is None or needed <= self.free_bytes or self._config.force:
            return
        n_ctx = self._config.n_ctx
        fits = self._fits_half()
        remedy = (
            f"use --tokens {fits // n_ctx * n_ctx:_}, " if fits >= 2 * n_ctx else "make room, use "
        )
        raise HarvestError(
            f"{n_tokens:,} tokens of {len(self._layers)} layers take {format_bytes(needed)}; "
            f"{format_bytes(self.free_bytes)} are free: {remedy}fewer --layers, or --force to try"
        )

    def plan(
        self, model: str, n_tokens: int, first_tokens: str = "", n_documents: int | None = None
    ) -> Plan:
        """Return the plan for so many tokens."""
        return Plan(
            model=model,
            layers=self._layers,
            n_ctx=self._config.n_ctx,
            n_tokens=n_tokens,
            n_documents=n_documents,
            bytes_per_token=self.activation_bytes,
            total_bytes=n_tokens * self.token_bytes + self.weight_bytes,
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


def require_same_request(store: Place, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise HarvestError unless a store was begun with these settings.

    keep_nonfinite may differ: it decides whether a harvest stops, not what it writes.
    """
    defaults = {field.name: field.default for field in fields(HarvestConfig)}
    begun = defaults | begun  # older versions knew fewer settings
    different = [
        f"{name} was {begun.get(name)!r}, is {value!r}"
        for name, value in asked.items()
        if begun.get(name) != value and name != "keep_nonfinite"
    ]
    if different:
        raise HarvestError(
            f"{store} holds another harvest ({'; '.join(different)}): "
            "give the same settings, choose another --store, or delete it"
        )
