"""One run of a language model on a prompt, frozen: all that is not linear is a constant.

    stream = embeddings, then for every module, attention before MLP,
             stream + writes(features + bias + error)             where a dictionary stands
             stream + writes(attention(reads(stream)))            the model's own, pattern frozen
             stream + error                                       an MLP that nothing replaces
    logits = scale (unembedding final(stream) + bias)

Constants are the scales of norms, attention patterns (the dictionary's where a Lorsa stands, else
the model's own), activations of features, and errors: the module's own output less the
dictionary's. So the frozen model's logits are those of the model itself.
"""

import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...dictionaries.code import Code
from ...dictionaries.dictionary import Dictionary
from ...dictionaries.lorsa.contributions import Projected, patterns_of
from ...dictionaries.lorsa.module import Lorsa
from ...sites import Ports
from .nodes import NOBODY, logit_depth
from .paths import FrozenNorm, Path


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Module:
    """Attention or MLP of a layer, and what stands in for it."""

    depth: int
    """Depth of what it writes; see `Nodes`"""
    below: int
    """Depth that bounds its sources: what it reads is the sum of all that is written before"""
    reads: FrozenNorm
    """Norm in front of it"""
    writes: FrozenNorm
    """Norm behind it, and what multiplies what it adds to the residual stream"""
    x: Tensor
    """What it reads, after the norm; of an SAE the site itself, [T, d_model]"""
    bias: Tensor | None = None
    """What it adds to the residual stream whatever it reads, [T, d_model]; None is 0"""
    error: Tensor | None = None
    """What it adds that no feature and no bias makes, [T, d_model]; None is 0"""
    run: int = NOBODY
    """Index of the dictionary in `Frozen.runs`"""
    dictionary: Dictionary | None = None
    code: Code | None = None
    """Features that fire, acts and ids each [T, slots]"""
    path: Path | None = None
    """Linear path of the model's own attention, or of a skip connection"""
    passes: bool = False
    """Whether the path goes on to the residual stream; that of an SAE leads to its features only"""


class Goal(NamedTuple):
    """A target at the end of the model: a direction of what the unembedding reads."""

    position: int
    """Token at which it reads"""
    vector: Tensor
    """[d_model]"""
    bias: float
    """Added to what the vector reads"""
    value: float
    """What it comes to on the prompt; of a logit, less the mean logit"""
    token: int = NOBODY
    """Token whose logit it is; NOBODY of other directions"""
    probability: float = 1.0
    """Weight among the goals: the token's probability after the prompt"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Logits:
    """The unembedding: logits of what it reads, before a cap and after."""

    weight: Tensor
    """[n_vocab, d_model]"""
    bias: Tensor | None
    """[n_vocab]"""
    scale: float = 1.0
    """Factor of the logits (Cohere, Granite)"""
    cap: float | None = None
    """Logits become cap tanh(logits / cap) (Gemma 2); goals are of those before the cap"""

    def before_cap(self, read: Tensor) -> Tensor:
        """Return logits before the cap, [..., n_vocab], of what is read, [..., d_model]."""
        return self.scale * nn.functional.linear(read, self.weight, self.bias)

    def capped(self, logits: Tensor) -> Tensor:
        """Return the model's logits of those before the cap."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frozen:
    """What a run of a language model on one prompt leaves; made by `freeze`."""

    tokens: Tensor
    """Ids of the prompt, int64, [T]"""
    runs: tuple[Ports, ...]
    """Places of the dictionaries, in the order in which they were given"""
    embedded: Tensor
    """Residual stream in front of the first block: token and position, [T, d_model]"""
    modules: tuple[Module, ...]
    """Attention and MLP of every layer, by depth"""
    parallel: frozenset[int]
    """Layers whose attention and MLP read the same residual stream"""
    final: FrozenNorm
    """Norm in front of the unembedding"""
    read: Tensor
    """What the unembedding reads, [T, d_model]"""
    logits: Logits
    goals: tuple[Goal, ...] = ()
    """Targets at the end, by position and token"""

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.modules) // 2

    @property
    def end(self) -> int:
        """Depth of the logits."""
        return logit_depth(self.n_layers)

    def module(self, depth: int) -> Module:
        """Return the module that writes at a depth."""
        return self.modules[depth - 1]

    def is_thin(self, below: int) -> bool:
        """Return whether nothing but the residual stream joins modules below a depth."""
        return not any(module.passes for module in self.modules[: below - 1])

    def mixes(self, below: int) -> bool:
        """Return whether tokens are mixed by the model's own attention below a depth."""
        under = self.modules[: below - 1]
        return any(m.passes and m.path is not None and m.path.mixes for m in under)

    def aimed(self, *goals: Goal) -> "Frozen":
        """Return the same run with these goals, by position and token."""
        return replace(self, goals=tuple(sorted(goals, key=lambda g: (g.position, g.token))))

    def to(self, dtype: torch.dtype) -> "Frozen":
        """Return the same constants in another precision; dictionaries are copied."""
        cast: Frozen = _cast(self, dtype)
        return cast


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with every floating-point tensor within it cast."""
    match value:
        case Tensor():
            return value.to(dtype) if value.is_floating_point() else value
        case nn.Module():
            return copy.deepcopy(value).to(dtype)
        case tuple():
            parts = [_cast(part, dtype) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type):
        named = {each.name: _cast(getattr(value, each.name), dtype) for each in fields(value)}
        return replace(value, **named)
    return value


class Attended(NamedTuple):
    """Queries, keys and gates of a Lorsa on the prompt, of which patterns are made as needed."""

    lorsa: Lorsa
    projected: Projected

    @classmethod
    def of(cls, module: Module) -> "Attended":
        """Return those of a module that holds a Lorsa."""
        assert isinstance(module.dictionary, Lorsa)
        with torch.no_grad():
            return cls(module.dictionary, module.dictionary.project(module.x[None]))

    def shares(self, positions: Tensor, heads: Tensor) -> Tensor:
        """Return how much heads take of each token: pattern, times the gate where there is one.

        Args:
            positions: of the queries, int64, [n]; memory goes by how far they lie apart.
            heads: OV heads, int64, [n].

        Returns:
            [n, last position + 1].
        """
        c, (q, k, _v, sinks, gate) = self.lorsa.config, self.projected
        rows = slice(int(positions.min()), int(positions.max()) + 1)
        patterns = patterns_of(c, q, k, rows, sinks)[0]  # [n_qk_heads, rows, keys]
        found = patterns[heads // (c.n_ov_heads // c.n_qk_heads), positions - rows.start]
        return found if gate is None else found * gate[0, positions, heads, None]
