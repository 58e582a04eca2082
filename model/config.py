"""The shape of a Lorsa: what config.json holds beside the weights."""

from dataclasses import asdict, dataclass
from typing import Any

from ..kernels import SELECTIONS
from .geometry import QKNorm, Rope, read_qk_norm, read_rope


@dataclass(frozen=True, kw_only=True, slots=True)
class LorsaConfig:
    """What a Lorsa computes, apart from its weights, and where it came from."""

    d_model: int
    """Width of the attention input and output."""
    n_qk_heads: int
    """Pairs of query and key projections, each shared by n_ov_heads / n_qk_heads OV heads."""
    d_qk_head: int
    """Width of a query or key."""
    n_ov_heads: int
    """Rank-1 heads: one scalar value and one output direction each."""
    top_k: int
    """Heads that fire per token."""
    scale: float
    """Multiplies the scores, usually d_qk_head ** -0.5."""
    select: str = "relu"
    """Which heads may fire: "relu" those with positive z, "abs" those with large |z|. The choice is
    by select(z) * ||w_O|| in training and in every later use."""
    rope: Rope | None = None
    """Rotary frequencies of the layer; None for a model without rotary positions."""
    qk_norm: QKNorm | None = None
    """Norm of queries and keys before the rotation, as the layer has it."""
    softcap: float | None = None
    """Cap of the scores, as the layer has it."""
    window: int | None = None
    """Sliding window of the attention, as the layer has it."""
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

    def __post_init__(self) -> None:
        for name in ("d_model", "n_qk_heads", "d_qk_head", "n_ov_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.n_ov_heads % self.n_qk_heads:
            below = self.n_ov_heads // self.n_qk_heads * self.n_qk_heads
            near = f"{below} or " if below else ""
            raise ValueError(
                f"n_ov_heads is {self.n_ov_heads}, not a multiple of n_qk_heads "
                f"{self.n_qk_heads}; use {near}{below + self.n_qk_heads}"
            )
        if not 1 <= self.top_k <= self.n_ov_heads:
            raise ValueError(f"top_k is {self.top_k}; allowed: 1..{self.n_ov_heads} (n_ov_heads)")
        if self.select not in SELECTIONS:
            raise ValueError(f"select is {self.select!r}; allowed: {', '.join(SELECTIONS)}")
        if self.rope is not None and 2 * len(self.rope.inv_freq) > self.d_qk_head:
            raise ValueError(
                f"rope rotates {2 * len(self.rope.inv_freq)} channels; "
                f"d_qk_head is {self.d_qk_head}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LorsaConfig":
        """Read what `to_dict` wrote; TypeError names a field that is missing or unknown."""
        rope, qk_norm = read_rope(data.get("rope")), read_qk_norm(data.get("qk_norm"))
        return cls(**{**data, "rope": rope, "qk_norm": qk_norm})
