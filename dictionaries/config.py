"""Settings that every kind of dictionary has: shape, rule of firing and origin, all checked."""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin
from unicodedata import category

from ..checks import require_at_least, require_one_of
from ..kernels.choices import SELECTIONS
from ..sites import Ports
from .activation import MAX_L0_FACTOR
from .choices import ACTIVATIONS, place_of, ports_of

BREAKS = ("Cc", "Zl", "Zp")
"""Unicode's categories of characters that end a line, or move a terminal."""

Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionaryConfig(ABC):
    """All that decides what a dictionary computes but its weights, and where it came from."""

    kind: ClassVar[str]
    """Kind of dictionary, as files and options have it"""
    title: ClassVar[str]
    """The kind in a sentence, as "a Lorsa" """
    noun: ClassVar[str]
    """The same without its article"""
    unit: ClassVar[str] = "feature"
    """What one of its features is called in a sentence"""
    features: ClassVar[str] = "n_features"
    """Field that has the number of features"""

    d_model: int
    """Width of what it reads and writes."""
    top_k: int
    """Features that fire per token; on average, with an activation other than "topk"."""
    select: str = "relu"
    """Which features may fire: "relu" those with positive z, "abs" those with large |z|. The choice
    is by select(z) * ||w_O|| in training and in every later use."""
    activation: str = "topk"
    """Rule by which they fire: "topk", "batchtopk" or "jumprelu" (dictionaries/activation.py)."""
    score_by_norm: bool = True
    """Whether ||w_O|| is a factor of the score. Without it the choice is by select(z) alone, as in
    some dictionaries of other tools."""
    has_threshold: bool = True
    """Whether the threshold is known; false with "batchtopk" only, as in dictionaries of other
    tools. Then the n * top_k largest scores of the n tokens given fire, until `set_threshold` sets
    it."""
    max_l0: int | None = None
    """Features that may fire on a token at most, where top_k is a mean. None becomes 4 * top_k, or
    all features if that is less; with "topk" it stays None."""
    n_ctx: int | None = None
    """Sequence length of the activations that it was trained on; information only."""
    base_model: str | None = None
    """Id of the language model whose activations it reads."""
    base_revision: str | None = None
    """Commit of that model, where one is known."""
    layer: int | None = None
    """Layer at which it lies, counted from 0."""
    store_uuid: str | None = None
    """Activation store that it was trained on."""
    hook_in: str | None = None
    """TransformerLens' name of what it reads, where that is not the site that its kind reads, as a
    norm's output without the norm's weight. Such a dictionary computes on its own, but stands in
    for nothing."""

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Number of features."""

    @property
    def place(self) -> str:
        """Name of its place, which is its folder's: layer-12 of a Lorsa, else 12.mlp, 12.resid_out.

        Raises:
            ValueError: it does not say at which layer it lies.
        """
        ports = self.ports
        return place_of(self.kind, ports.writes[0])

    @property
    def ports(self) -> Ports:
        """Sites that it reads and writes.

        Raises:
            ValueError: it does not say at which layer it lies.
        """
        if self.layer is None:
            raise ValueError(f"{self.title} that does not say its layer has no ports; give layer")
        return self.ports_at(self.layer)

    def ports_at(self, layer: int) -> Ports:
        """Return the sites that it would read and write at a layer."""
        return ports_of(self.kind, layer)

    @property
    def sizes(self) -> str:
        """Sizes of its parts in words, as "4,608 features"."""
        return f"{self.n_features:,} features"

    @abstractmethod
    def token_bytes(self) -> int:
        """Return about how many bytes a token takes in a step, besides the parameters."""

    @abstractmethod
    def weight_shapes(self) -> Shapes:
        """Return the shape of every parameter but the thresholds, by name."""

    def parameter_shapes(self) -> Shapes:
        """Return the shape of every parameter, by name."""
        thresholds: Shapes = {"log_threshold": (self.n_features,)}
        return self.weight_shapes() | (thresholds if self.activation == "jumprelu" else {})

    def tensor_shapes(self) -> Shapes:
        """Return the shape of every tensor in a checkpoint, by name."""
        return self.parameter_shapes() | ({} if self.activation == "topk" else {"threshold": ()})

    @property
    def n_slots(self) -> int:
        """Width of acts and ids: the features that may fire on a token."""
        return self.top_k if self.max_l0 is None else self.max_l0

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote; TypeError names a field that is missing or unknown."""
        return cls(**data)

    def __post_init__(self) -> None:
        self._check_kinds()
        require_at_least(self, 1, "d_model", self.features, "n_ctx")
        require_at_least(self, 0, "layer")
        self._check_shape()
        if not 1 <= self.top_k <= self.n_features:
            raise ValueError(
                f"top_k is {self.top_k}; allowed: 1..{self.n_features} ({self.features})"
            )
        require_one_of(self, select=SELECTIONS, activation=ACTIVATIONS)
        self._check_activation()

    def _check_shape(self) -> None:  # noqa: B027
        """Raise ValueError if what a kind has besides does not fit."""

    def _check_kinds(self) -> None:
        """Raise ValueError if a value is not of its field's type; files of others may hold any."""
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = _plain(field.type)
            if float in kinds and type(value) is int:
                value = float(value)
            is_bool = isinstance(value, bool)
            if not isinstance(value, kinds) or (is_bool and bool not in kinds):
                meant = getattr(field.type, "__name__", str(field.type))
                raise ValueError(f"{field.name} is {value!r:.80}; {meant} is meant")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}; a finite number is meant")
            if isinstance(value, str) and any(category(c) in BREAKS for c in value):
                raise ValueError(f"{field.name} is {value!r:.80}; a line of text is meant")

    def _check_activation(self) -> None:
        """Raise ValueError if the activation does not fit the rest; fill in max_l0."""
        if not self.has_threshold and self.activation != "batchtopk":
            raise ValueError("has_threshold is false; that goes with activation 'batchtopk' only")
        if self.activation == "topk":
            if self.max_l0 is not None:
                raise ValueError(
                    f"max_l0 is {self.max_l0}; activation 'topk' lets top_k fire: leave it out"
                )
            return
        if self.select != "relu":
            raise ValueError(
                f"select is {self.select!r}; activation {self.activation!r} goes with 'relu' only"
            )
        if self.max_l0 is None:
            most = min(MAX_L0_FACTOR * self.top_k, self.n_features)
            object.__setattr__(self, "max_l0", most)
        elif not self.top_k <= self.max_l0 <= self.n_features:
            raise ValueError(
                f"max_l0 is {self.max_l0}; allowed: {self.top_k}..{self.n_features} "
                f"(top_k..{self.features})"
            )


def _plain(kind: Any) -> tuple[type, ...]:
    """Return the classes that a value of a field's type may have."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return tuple(get_origin(each) or each for each in kinds)
