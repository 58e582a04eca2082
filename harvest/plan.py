"""Bytes that a harvest will write, and whether they fit, known before the model runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..errors import HarvestError
from ..sites import Site, spell_site_names
from ..store.arrays import itemsize
from ..store.care.info import format_bytes
from ..store.layers import spell_layers
from ..store.places import Place, free_disk_bytes, tree_bytes
from ..store.site_facts import SiteFacts, owner_of
from .chosen import asked_names, deriving, facts_of
from .config import HarvestConfig

DEFAULT_MAX_TOKENS = 10_000_000
SHARD_FILE_BYTES = 512 << 20
"""Largest file of a shard."""
MANY_FILE_BYTES = 64 << 20
"""What a file may have however many arrays share a shard: a store is not a million small files."""
SHARD_BYTES = 8 << 30
"""Largest shard over all arrays, which bounds what a killed harvest has to redo, unless they are so
many that its files would be smaller than that."""
MIN_SHARDS = 20
"""Fewest shards of a store, so that 5 % of them can be held out."""
TOKEN_BYTES = 8
"""Bytes of a token's id and document."""
SCALE_BYTES = 4
"""Bytes of a token's scale in an int8 array."""
NORM_BYTES = 4
"""Bytes of a token's norm at a site."""
SUGGESTED_SHARE = 0.9
"""Share of the free disk that a refusal suggests to take."""
DEFAULT_SHARE = 0.5
"""Share of the free disk that a harvest without --tokens takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Time that a harvest will take, from a batch that was timed."""

    batch_seqs: int
    """Sequences in a forward pass."""
    tokens_per_second: float
    """Rate of all processes together."""
    seconds: float
    """Seconds for the tokens that are missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Layers, tokens and bytes of a harvest."""

    model: str
    """Id of the language model."""
    device: str
    """Device that the model will run on."""
    layers: dict[int, str]
    """Layers that will be written, with the names of the modules that are read there."""
    sites: list[str]
    """Sites that will be written, as 12.attn_in."""
    n_ctx: int
    """Tokens in a sequence."""
    n_tokens: int
    """Tokens of the store."""
    n_documents: int | None
    """Documents that the tokens come from; None when no text was read."""
    bytes_per_token: int
    """Bytes of the activations of all layers."""
    total_bytes: int
    """Bytes that will be written, before compression."""
    free_bytes: int | None
    """Free bytes of the disk, with what is there of these layers; None for a bucket."""
    first_tokens: str
    """Beginning of the first sequence, as text; empty when no text was read."""
    warning: str = ""
    """Share of the corpus that was passed over, if it is more than a tenth; empty if it is not."""
    estimate: Estimate | None = None
    """Time of the harvest, in a dry run with the model's weights on this machine."""


class Cost(NamedTuple):
    """Bytes that a store takes."""

    activation_bytes: int
    """Bytes of a token's activations"""
    token_bytes: int
    """Bytes of a token in all arrays"""
    fixed_bytes: int
    """Bytes of the layers' own weights, at most"""

    def total(self, n_tokens: int) -> int:
        """Return the bytes of a store of so many tokens."""
        return n_tokens * self.token_bytes + self.fixed_bytes

    def fitting(self, n_bytes: float, n_ctx: int) -> int:
        """Return how many tokens fit, in whole sequences; 0 if fewer than two sequences do."""
        n_tokens = int((n_bytes - self.fixed_bytes) // self.token_bytes) // n_ctx * n_ctx
        return n_tokens if n_tokens >= 2 * n_ctx else 0


def cost(facts: Mapping[Site, SiteFacts], *, dtype: str, d_mlp: int) -> Cost:
    """Return the bytes that some sites take, before compression.

    Args:
        facts: what the manifest says of them.
        dtype: of the activations that are stored.
        d_mlp: neurons of a layer's MLP.
    """
    scale = SCALE_BYTES if dtype == "int8" else 0
    widths = [about.width for about in facts.values() if about.is_stored]
    activation_bytes = sum(width * itemsize(dtype) + scale for width in widths)
    token_bytes = activation_bytes + NORM_BYTES * len(facts) + TOKEN_BYTES
    d_model = max(about.width for about in facts.values())
    # W_Q, W_K, W_V and W_O if all are square; gate, up and down; four norms with biases
    weights = {"attention": 4 * d_model**2, "mlp": 3 * d_model * d_mlp, "block": 8 * d_model}
    modules = {owner_of(site) for site in facts} | deriving(facts)
    n_weights = sum(weights[module.partition(".")[2]] for module in modules)
    return Cost(activation_bytes, token_bytes, n_weights * itemsize("float32"))


class Sizes:
    """Arithmetic of one request on one model: bytes of a token, and how many tokens fit."""

    def __init__(
        self,
        config: HarvestConfig,
        layers: dict[int, str],
        d_model: int,
        *,
        sites: Iterable[Site] | None = None,
        known: Mapping[Site, SiteFacts] | None = None,
        d_mlp: int | None = None,
        there: Sequence[Place] | None = None,
    ) -> None:
        """Measure the free disk.

        Args:
            config: the request.
            layers: layers to be written, with the names of the modules that are read there.
            d_model: width of an activation.
            sites: sites to be written; None: all that the request means.
            known: sites that the store has besides.
            d_mlp: neurons of a layer's MLP; None: four times the width.
            there: folders whose bytes in the store are overwritten, or count towards what is to be
                written; None: all that is there.
        """
        self._config = config
        self._layers = layers
        self._d_model, self._d_mlp = d_model, d_mlp or 4 * d_model
        self._known = known or {}
        self._sites = self._asked_sites(config.outputs) if sites is None else list(sites)
        self.cost = self._cost()
        free = free_disk_bytes(config.store)
        rooms = [config.store] if there is None else there
        self.free_bytes = None if free is None else free + sum(map(tree_bytes, rooms))

    def _asked_sites(self, outputs: str) -> list[Site]:
        names = asked_names(self._config.sites, outputs)
        return [Site(layer, name) for layer in self._layers for name in names]

    def _cost(
        self, n_layers: int | None = None, *, dtype: str | None = None, outputs: str | None = None
    ) -> Cost:
        """Return what the sites cost, or those of the first layers, or kept in another way."""
        layers = sorted(self._layers)[:n_layers]
        sites = self._sites if outputs is None else self._asked_sites(outputs)
        some = [site for site in sites if site.layer in layers]
        widths = dict.fromkeys(some, self._d_model)
        facts = facts_of(some, widths, self._known, outputs or self._config.outputs)
        return cost(facts, dtype=dtype or self._config.dtype, d_mlp=self._d_mlp)

    def max_tokens(self) -> int:
        """Return how many tokens to harvest at most, in whole sequences.

        Raises:
            HarvestError: the disk does not take so many, or they are fewer than two sequences.
        """
        n_tokens = self._asked()
        self.require_room(n_tokens)
        return n_tokens

    def default(self) -> str | None:
        """Return a line on the tokens taken by default; None if tokens or a budget were given."""
        if self._config.tokens is not None or self._config.budget is not None:
            return None
        n_tokens = self._asked()
        if self.free_bytes is None or n_tokens == self._whole(DEFAULT_MAX_TOKENS):
            return f"no --tokens or --budget given: {n_tokens:,} tokens, the default"
        return (
            f"no --tokens or --budget given: {n_tokens:,} tokens, which take half of the "
            f"{format_bytes(self.free_bytes)} that are free"
        )

    def _n_layers(self) -> str:
        words = f"{len(self._layers)} layer{'' if len(self._layers) == 1 else 's'}"
        names = spell_site_names({site.name for site in self._sites})
        return words if names == "attn" else f"{words} ({names})"

    def _whole(self, n_tokens: int) -> int:
        return n_tokens // self._config.n_ctx * self._config.n_ctx

    def _asked(self) -> int:
        """Return the tokens that are asked for, in whole sequences.

        Raises:
            HarvestError: they are fewer than two sequences.
        """
        c = self._config
        limits = [c.tokens]
        if c.budget_bytes is not None:
            limits.append(self._fitting(c.budget_bytes, f"a budget of {c.budget}"))
        elif c.tokens is None:
            limits.append(DEFAULT_MAX_TOKENS)
            if self.free_bytes is not None:
                free = f"{format_bytes(self.free_bytes)} free on the disk"
                limits.append(self._fitting(self.free_bytes * DEFAULT_SHARE, free))
        n_tokens = min(limit for limit in limits if limit is not None)
        if n_tokens < 2 * c.n_ctx:
            raise HarvestError(
                f"{n_tokens} tokens do not make two sequences of {c.n_ctx} (one to train, "
                "one to test): use a larger --tokens or a smaller --n-ctx"
            )
        return self._whole(n_tokens)

    def _fitting(self, n_bytes: float, what: str) -> int:
        n_tokens = self.cost.fitting(n_bytes, self._config.n_ctx)
        if n_tokens == 0:
            remedy = "a larger --budget" if self._config.budget else "another disk by --store"
            raise HarvestError(
                f"{what} is too little for two sequences of {self._n_layers()}: use fewer "
                f"--layers, --dtype int8 --outputs derive, or {remedy}"
            )
        return n_tokens

    def require_room(self, n_tokens: int, *, changeable: bool = True) -> None:
        """Raise HarvestError unless the disk takes so many tokens, or --force was given.

        Args:
            n_tokens: tokens of the store.
            changeable: whether tokens, dtype and outputs can still be chosen.
        """
        free, needed = self.free_bytes, self.cost.total(n_tokens)
        if free is None or needed <= free or self._config.force:
            return
        fits = self._options(n_tokens, free) if changeable else self._fewer_layers(n_tokens, free)
        what = f"what fits: {'; or '.join(fits)}" if fits else "make room"
        raise HarvestError(
            f"{n_tokens:,} tokens of {self._n_layers()} take {format_bytes(needed)}; "
            f"{format_bytes(free)} are free; {what}; or --force to try"
        )

    def _options(self, n_tokens: int, free: int) -> list[str]:
        """Return options that would fit: fewer tokens, fewer bytes per token, fewer layers."""
        n_ctx, room = self._config.n_ctx, free * SUGGESTED_SHARE
        options = []
        if fewer := self.cost.fitting(room, n_ctx):
            options.append(f"--tokens {fewer:_}")
        smaller = self._cost(dtype="int8", outputs="derive")
        if smaller.token_bytes < self.cost.token_bytes and (fewer := smaller.fitting(room, n_ctx)):
            tokens = "" if fewer >= n_tokens else f" --tokens {fewer:_}"
            size = format_bytes(smaller.total(min(fewer, n_tokens)))
            options.append(f"--dtype int8 --outputs derive{tokens} ({size})")
        return options + self._fewer_layers(n_tokens, free)

    def _fewer_layers(self, n_tokens: int, free: int) -> list[str]:
        for n_layers in range(len(self._layers) - 1, 0, -1):
            size = self._cost(n_layers).total(n_tokens)
            if size <= free * SUGGESTED_SHARE:
                some = spell_layers(sorted(self._layers)[:n_layers])
                return [f"--layers {some} ({format_bytes(size)})"]
        return []

    def plan(
        self,
        model: str,
        n_tokens: int,
        *,
        device: str,
        first_tokens: str = "",
        n_documents: int | None = None,
        warning: str = "",
    ) -> Plan:
        """Return the plan for n_tokens tokens."""
        return Plan(
            model=model,
            device=device,
            layers=self._layers,
            sites=[str(site) for site in self._sites],
            n_ctx=self._config.n_ctx,
            n_tokens=n_tokens,
            n_documents=n_documents,
            bytes_per_token=self.cost.activation_bytes,
            total_bytes=self.cost.total(n_tokens),
            free_bytes=self.free_bytes,
            first_tokens=first_tokens,
            warning=warning,
        )


def n_arrays(sites: Mapping[Site, SiteFacts]) -> int:
    """Return how many arrays count in the size of a shard: at most two of a layer.

    More sites make shards larger, not shorter: what is lost with one costs the forward passes of
    its sequences, however many arrays they fill.
    """
    stored = sum(facts.is_stored for facts in sites.values())
    return min(stored, 2 * len({site.layer for site in sites}))


def shard_seqs(n_seq: int, *, seq_bytes: int, n_arrays: int) -> int:
    """Return how many sequences a shard holds: a power of two.

    Args:
        n_seq: sequences of the store.
        seq_bytes: bytes of one sequence in one array.
        n_arrays: arrays that share a shard, as `n_arrays` counts them.
    """
    file_bytes = max(MANY_FILE_BYTES, SHARD_BYTES // n_arrays)
    most = min(SHARD_FILE_BYTES, file_bytes) // seq_bytes
    most = max(1, min(most, n_seq // MIN_SHARDS))
    return int(1 << (most.bit_length() - 1))


def require_same_request(store: Place, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise HarvestError unless a store was created with these settings.

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
