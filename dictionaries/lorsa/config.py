"""The shape of a Lorsa: what config.json holds beside the weights."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any
from unicodedata import category

from ...checks import require_at_least, require_one_of, require_positive
from ...kernels.choices import SELECTIONS
from ...language.geometry import Alibi, QKNorm, Rope, Stretch, present, read_parts
from ..activation import MAX_L0_FACTOR
from ..choices import ACTIVATIONS

BREAKS = ("Cc", "Zl", "Zp")
"""Unicode's categories of characters that end a line, or move a terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LorsaConfig:
    """All that decides what a Lorsa computes but its weights, and where it came from."""

    d_model: int
    """Width of the attention input and output."""
    n_qk_heads: int
    """Pairs of query and key projections, each shared by n_ov_heads / n_qk_heads OV heads."""
    d_qk_head: int
    """Width of a query or key."""
    n_ov_heads: int
    """Rank-1 heads: one scalar value and one output direction each."""
    top_k: int
    """Heads that fire per token; on average, with an activation other than "topk"."""
    scale: float
    """Multiplies the scores, usually d_qk_head ** -0.5."""
    select: str = "relu"
    """Which heads may fire: "relu" those with positive z, "abs" those with large |z|. The choice is
    by select(z) * ||w_O|| in training and in every later use."""
    activation: str = "topk"
    """Rule by which heads fire: "topk", "batchtopk" or "jumprelu" (dictionaries/activation.py)."""
    score_by_norm: bool = True
    """Whether ||w_O|| is a factor of the score. Without it the choice is by select(z) alone, as in
    some Lorsas of other tools."""
    has_threshold: bool = True
    """Whether the threshold is known; false with "batchtopk" only, as in Lorsas of other tools.
    Then the n * top_k largest scores of the n tokens given fire, until `set_threshold` sets it."""
    max_l0: int | None = None
    """Heads that may fire on a token at most, where top_k is a mean. None becomes 4 * top_k, or
    n_ov_heads if that is less; with "topk" it stays None."""
    rope: Rope | None = None
    """Rotary frequencies of the layer; None for a model without rotary positions."""
    qk_norm: QKNorm | None = None
    """Norm of queries and keys before the rotation, as the layer has it."""
    softcap: float | None = None
    """Cap of the scores, as the layer has it."""
    window: int | None = None
    """Sliding window of the attention, as the layer has it."""
    clip: float | None = None
    """Queries and keys are limited to +-clip before the rotation, as the layer does. Its values are
    limited too; a head's value, a direction of many of them, is not."""
    chunk: int | None = None
    """Size of the chunks within which queries see keys, as the layer has it."""
    stretch: Stretch | None = None
    """Growth of the queries with their position, as the layer has it."""
    alibi: Alibi | None = None
    """Linear biases of the scores, a slope for each QK head: that of the layer's head."""
    n_ctx: int | None = None
    """Sequence length of the activations that it was trained on; information only."""
    base_model: str | None = None
    """Id of the language model whose layer it replaces."""
    base_revision: str | None = None
    """Commit of that model, where one is known."""
    layer: int | None = None
    """Layer that it replaces, counted from 0."""
    store_uuid: str | None = None
    """Activation store that it was trained on."""
    hook_in: str | None = None
    """TransformerLens' name of what it reads, where that is not the layer's input after the norm,
    with the norm's weight. Such a Lorsa computes on its own, but stands in for no layer."""

    def __post_init__(self) -> None:
        self._check_kinds()
        sizes = ("d_model", "n_qk_heads", "d_qk_head", "n_ov_heads", "n_ctx", "window", "chunk")
        require_at_least(self, 1, *sizes)
        require_at_least(self, 0, "layer")
        require_positive(self, "softcap", "clip")
        if self.n_ov_heads % self.n_qk_heads:
            below = self.n_ov_heads // self.n_qk_heads * self.n_qk_heads
            near = f"{below} or " if below else ""
            raise ValueError(
                f"n_ov_heads is {self.n_ov_heads}, not a multiple of n_qk_heads "
                f"{self.n_qk_heads}; use {near}{below + self.n_qk_heads}"
            )
        if not 1 <= self.top_k <= self.n_ov_heads:
            raise ValueError(f"top_k is {self.top_k}; allowed: 1..{self.n_ov_heads} (n_ov_heads)")
        require_one_of(self, select=SELECTIONS, activation=ACTIVATIONS)
        self._check_activation()
        if self.rope is not None and 2 * len(self.rope.inv_freq) > self.d_qk_head:
            raise ValueError(
                f"rope rotates {2 * len(self.rope.inv_freq)} channels; "
                f"d_qk_head is {self.d_qk_head}"
            )

        if self.alibi is not None and len(self.alibi.slopes) != self.n_qk_heads:
            raise ValueError(
                f"alibi has {len(self.alibi.slopes)} slopes; n_qk_heads is {self.n_qk_heads}"
            )

    def _check_kinds(self) -> None:
        """Raise ValueError if a value is not of its field's type; files of others may hold any."""
        for field in fields(self):
            value = getattr(self, field.name)
            kind: Any = field.type
            if kind in (float, float | None) and type(value) is int:
                value = float(value)
            is_bool = isinstance(value, bool)
            if not isinstance(value, kind) or (is_bool and kind is not bool):
                meant = getattr(kind, "__name__", str(kind))
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
            most = min(MAX_L0_FACTOR * self.top_k, self.n_ov_heads)
            object.__setattr__(self, "max_l0", most)
        elif not self.top_k <= self.max_l0 <= self.n_ov_heads:
            raise ValueError(
                f"max_l0 is {self.max_l0}; allowed: {self.top_k}..{self.n_ov_heads} "
                "(top_k..n_ov_heads)"
            )

    @property
    def n_slots(self) -> int:
        """Width of acts and ids: the heads that may fire on a token."""
        return self.top_k if self.max_l0 is None else self.max_l0

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-able data, without what only some layers have."""
        return present(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LorsaConfig":
        """Read what `to_dict` wrote; TypeError names a field that is missing or unknown."""
        return cls(**read_parts(data))


def parameter_shapes(config: LorsaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a Lorsa."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {
        "W_Q": (c.n_qk_heads, c.d_model, c.d_qk_head),
        "W_K": (c.n_qk_heads, c.d_model, c.d_qk_head),
        "W_V": (c.n_ov_heads, c.d_model),
        "W_O": (c.n_ov_heads, c.d_model),
        "b_Q": (c.n_qk_heads, c.d_qk_head),
        "b_K": (c.n_qk_heads, c.d_qk_head),
        "b_V": (c.n_ov_heads,),
        "b_O": (c.d_model,),
    }
    if c.qk_norm is not None:
        shape = (c.n_qk_heads, c.d_qk_head) if c.qk_norm.by_head else (c.d_qk_head,)
        shapes |= {"q_norm": shape, "k_norm": shape}
    if c.qk_norm is not None and c.qk_norm.kind == "layer":
        shapes |= {"q_norm_bias": shape, "k_norm_bias": shape}
    if c.activation == "jumprelu":
        shapes["log_threshold"] = (c.n_ov_heads,)
    return shapes


def tensor_shapes(config: LorsaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in a checkpoint."""
    shapes = parameter_shapes(config)
    return shapes if config.activation == "topk" else shapes | {"threshold": ()}
