"""The shape of a Lorsa: what config.json holds beside the weights."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from ...checks import require_at_least, require_one_of, require_positive
from ...language.geometry import GATES, RARE, Alibi, QKNorm, Rope, Stretch, present, read_parts
from ..config import DictionaryConfig, Shapes

ORDER = (
    "d_model", "n_qk_heads", "d_qk_head", "n_ov_heads", "top_k", "scale", "select", "activation",
    "score_by_norm", "has_threshold", "max_l0", "rope", "qk_norm", "softcap", "window", "n_ctx",
    "base_model", "base_revision", "layer", "store_uuid", "hook_in",
)  # fmt: skip
"""Fields in the order in which files have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LorsaConfig(DictionaryConfig):
    """All that decides what a Lorsa computes but its weights, and where it came from.

    Features are its OV heads.
    """

    kind: ClassVar[str] = "lorsa"
    title: ClassVar[str] = "a Lorsa"
    noun: ClassVar[str] = "Lorsa"
    unit: ClassVar[str] = "head"
    features: ClassVar[str] = "n_ov_heads"

    n_qk_heads: int
    """Pairs of query and key projections, each shared by n_ov_heads / n_qk_heads OV heads."""
    d_qk_head: int
    """Width of a query or key."""
    n_ov_heads: int
    """Rank-1 heads: one scalar value and one output direction each."""
    scale: float
    """Multiplies the scores, usually d_qk_head ** -0.5."""
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
    sinks: bool = False
    """Whether each QK head has a score in the denominator of the softmax that has no value."""
    gate: str | None = None
    """Function of x W_G^T + b_G that multiplies z before the selection, as the layer gates what its
    heads attend to: "sigmoid" or "softplus"."""

    @property
    def n_features(self) -> int:
        """Number of OV heads."""
        return self.n_ov_heads

    @property
    def sizes(self) -> str:
        """Numbers of its heads in words."""
        return f"{self.n_ov_heads:,} OV heads and {self.n_qk_heads} QK heads"

    def token_bytes(self) -> int:
        """Return about how many bytes a token takes in a step, besides the parameters."""
        queries_keys = 2 * self.n_qk_heads * self.d_qk_head
        # made, rotated, and their gradients; v and its gradient; x, y, y_hat and theirs
        width = 5 * queries_keys + 3 * self.n_ov_heads + 6 * self.d_model + 8 * self.n_slots
        if self.gate is not None:  # its logits, itself, and their gradients
            width += 4 * self.n_ov_heads
        return 4 * width

    def _check_shape(self) -> None:
        require_at_least(self, 1, "n_qk_heads", "d_qk_head", "window", "chunk")
        require_positive(self, "softcap", "clip")
        if self.gate is not None:
            require_one_of(self, gate=GATES)
        if self.n_ov_heads % self.n_qk_heads:
            below = self.n_ov_heads // self.n_qk_heads * self.n_qk_heads
            near = f"{below} or " if below else ""
            raise ValueError(
                f"n_ov_heads is {self.n_ov_heads}, not a multiple of n_qk_heads "
                f"{self.n_qk_heads}; use {near}{below + self.n_qk_heads}"
            )
        if self.rope is not None and 2 * len(self.rope.inv_freq) > self.d_qk_head:
            raise ValueError(
                f"rope rotates {2 * len(self.rope.inv_freq)} channels; "
                f"d_qk_head is {self.d_qk_head}"
            )
        if self.alibi is not None and len(self.alibi.slopes) != self.n_qk_heads:
            raise ValueError(
                f"alibi has {len(self.alibi.slopes)} slopes; n_qk_heads is {self.n_qk_heads}"
            )

    def weight_shapes(self) -> Shapes:
        """Return the shape of every parameter but the thresholds, by name."""
        shapes: Shapes = {
            "W_Q": (self.n_qk_heads, self.d_model, self.d_qk_head),
            "W_K": (self.n_qk_heads, self.d_model, self.d_qk_head),
            "W_V": (self.n_ov_heads, self.d_model),
            "W_O": (self.n_ov_heads, self.d_model),
            "b_Q": (self.n_qk_heads, self.d_qk_head),
            "b_K": (self.n_qk_heads, self.d_qk_head),
            "b_V": (self.n_ov_heads,),
            "b_O": (self.d_model,),
        }
        if self.qk_norm is not None:
            by_head = (self.n_qk_heads, self.d_qk_head)
            shape = by_head if self.qk_norm.by_head else (self.d_qk_head,)
            shapes |= {"q_norm": shape, "k_norm": shape}
            if self.qk_norm.kind == "layer":
                shapes |= {"q_norm_bias": shape, "k_norm_bias": shape}
        if self.sinks:
            shapes["sinks"] = (self.n_qk_heads,)
        if self.gate is not None:
            shapes |= {"W_G": shapes["W_V"], "b_G": shapes["b_V"]}
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-able data, in the order of files, without what it has not."""
        data = asdict(self)
        return present({name: data[name] for name in (*ORDER, *RARE)})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote; TypeError names a field that is missing or unknown."""
        return cls(**read_parts(data))
