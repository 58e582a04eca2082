"""Geometry of an attention layer: heads, scale, rotary, norms and mask, without its weights.

harvest reads these facts off the language model, the store keeps them as JSON, and a Lorsa copies
them. Nothing here is typed in by a user.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

LAYER_ONLY = ("latent",)
"""Settings of a layer that no Lorsa has."""
RARE = ("clip", "chunk", "stretch", "alibi", "sinks", "gate")
"""Settings that earlier versions do not know; they are written where a layer has them."""
GATES = ("sigmoid", "softplus")
NORM_KINDS = ("rms", "rms_by_head", "rms_full", "layer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), by its frequencies."""

    inv_freq: tuple[float, ...]
    """Radians per position of each pair; 2 * len(inv_freq) leading channels of a head rotate."""
    attention_scaling: float = 1.0
    """Multiplies cos and sin (YaRN and LongRoPE use it)."""
    interleaved: bool = False
    """Pairs are channels (2i, 2i + 1); otherwise (i, i + half), usual in transformers."""

    def __post_init__(self) -> None:
        if not all(map(_is_finite, self.inv_freq)) or not _is_finite(self.attention_scaling):
            raise ValueError(
                "rope has a frequency or an attention_scaling that is no finite number"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class QKNorm:
    """Norm of q and k before the rotation."""

    eps: float
    """Added to the mean square or the variance."""
    kind: str = "rms"
    """"rms" over the channels of each head, with one factor for all heads (Qwen 3); "rms_by_head",
    the same with a factor for each head (Lorsas of other tools); "rms_full" over the channels of
    all heads together (OLMo 2); "layer", which takes off the mean too, over the channels of each
    head (StableLM)."""

    def __post_init__(self) -> None:
        if self.kind not in NORM_KINDS:
            raise ValueError(f"qk-norm is {self.kind!r}; allowed: {', '.join(NORM_KINDS)}")
        if not _is_finite(self.eps):
            raise ValueError(f"eps of the qk-norm is {self.eps!r:.80}; a finite number is meant")

    @property
    def by_head(self) -> bool:
        """Whether each head has factors of its own, [n_heads, d_head] instead of [d_head]."""
        return self.kind != "rms"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Growth of the queries with their position t: 1 + gain * log(1 + floor((t + first) / every)).

    Source: Nakanishi 2025, arXiv:2501.19399, as Llama 4 and Ministral 3 have it.
    """

    gain: float
    every: float
    first: int = 0

    def __post_init__(self) -> None:
        if not all(map(_is_finite, (self.gain, self.every, self.first))) or self.every <= 0:
            raise ValueError(f"stretch of the queries is {self}; finite numbers are meant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alibi:
    """Linear biases: slope * s is added to the score of a head with the key at position s.

    Source: Press et al. 2021, arXiv:2108.12409; the softmax takes off what depends on t alone.
    """

    slopes: tuple[float, ...]
    """Slope of each query head."""
    scaled: bool = False
    """Whether the scale multiplies the bias too (Falcon)."""
    rounded: bool = False
    """Whether slope * s is rounded to bfloat16, whatever precision the model has (Falcon)."""
    cast: str | None = None
    """Precision to which the scaled bias is rounded: "bfloat16" or "float16" (Falcon in these)."""

    def __post_init__(self) -> None:
        if not all(map(_is_finite, self.slopes)):
            raise ValueError("alibi has a slope that is no finite number")
        if self.cast not in (None, "bfloat16", "float16"):
            raise ValueError(f"alibi is cast to {self.cast!r:.80}; allowed: bfloat16, float16")

    def of_heads(self, n_heads: int) -> "Alibi":
        """Return the biases of more or fewer heads, which take after these in equal shares."""
        n = len(self.slopes)
        return replace(self, slopes=tuple(self.slopes[i * n // n_heads] for i in range(n_heads)))


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionGeometry:
    """One attention layer of the language model."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    """Key and value heads; head h reads key head h // (n_heads // n_kv_heads)."""
    d_head: int
    scale: float
    """Multiplies the scores."""
    rope: Rope | None = None
    qk_norm: QKNorm | None = None
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) before the softmax (Gemma 2)."""
    window: int | None = None
    """A query sees itself and the window - 1 positions before it."""
    clip: float | None = None
    """Queries, keys and values are limited to +-clip before the rotation (OLMo, MPT, DBRX)."""
    chunk: int | None = None
    """A query sees the positions of its own chunk of so many up to itself (Llama 4)."""
    stretch: Stretch | None = None
    """Growth of the queries with their position, after the rotation (Llama 4, Ministral 3)."""

    alibi: Alibi | None = None
    """Linear biases of the scores (MPT, Falcon)."""
    sinks: bool = False
    """Whether heads have a score in the denominator of the softmax that has no value (gpt-oss)."""
    latent: float | None = None
    """eps of the norm of the latents that queries, keys and values are made of (DeepSeek)."""
    gate: str | None = None
    """Function of x W_G + b_G that multiplies what heads attend to, before the output projection:
    "sigmoid" (Qwen3-Next) or "softplus" (Laguna)."""

    def to_dict(self) -> dict[str, Any]:
        """Return the geometry as JSON-able data, without what only some layers have."""
        return present(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionGeometry":
        """Read what `to_dict` wrote."""
        return cls(**read_parts(data))


def present(data: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a layer or Lorsa without those of RARE that it has not."""
    rare = (*RARE, *LAYER_ONLY)
    return {name: value for name, value in data.items() if value or name not in rare}


def _is_finite(value: Any) -> bool:
    """Return whether a value, as a stranger's file may have it, is a finite number."""
    return isinstance(value, (float, int)) and abs(value) < math.inf


def read_parts(data: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a layer or Lorsa from JSON data, with the parts that are objects read."""
    readers: dict[str, Callable[[Any], Any]] = {
        "rope": read_rope,
        "qk_norm": read_qk_norm,
        "stretch": lambda part: Stretch(**part),
        "alibi": lambda part: Alibi(**{**part, "slopes": tuple(part["slopes"])}),
    }
    found = dict(data)
    for name, read in readers.items():
        if data.get(name) is not None:
            found[name] = read(data[name])
    return found


def read_rope(data: dict[str, Any] | None) -> Rope | None:
    """Read a `Rope` from JSON data."""
    return None if data is None else Rope(**{**data, "inv_freq": tuple(data["inv_freq"])})


def read_qk_norm(data: dict[str, Any] | None) -> QKNorm | None:
    """Read a `QKNorm` from JSON data."""
    return None if data is None else QKNorm(**data)
