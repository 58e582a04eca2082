"""Norms of the language model around an attention layer, and what they do to a vector.

Between a head and the logits lie a norm (two, where the attention's output has its own) and the
unembedding; between an embedding and a head's value lies the norm before the attention. Which
module is which shows in what goes in and out of it, so no model family is spelled out:

    RMS     n(h) = h / sqrt(mean(h^2) + eps)                   out = weight * n(h) + bias
    layer   n(h) = c / sqrt(mean(c^2) + eps), c = h - mean(h)
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import LanguageModelError
from .blocks import AttentionSite, float32_copy
from .capture import Enough
from .edit import module_input, module_output

FEW_TOKENS = 8
"""Tokens that the model runs on to find its norms; only of so few is every norm's output kept."""
LARGE = 1024.0
"""Root mean square of what a norm is probed with; a power of two, next to which eps is nothing."""
SMALL = 1e-3
"""Root mean square of a second probe, whose square is of the size of eps."""
PROBE_TOLERANCE = 1e-3


class Norm(NamedTuple):
    """Arithmetic of a norm: weight * n(h) + bias."""

    weight: Tensor
    """[d_model], float64"""
    bias: Tensor
    """[d_model], float64"""
    centred: bool
    """Whether n(h) takes the mean off, as LayerNorm does"""
    eps: float = 0.0
    """Added to the mean square"""

    @classmethod
    def read(cls, module: nn.Module, d_model: int) -> "Norm":
        """Read a norm off its outputs, in float32.

        It is probed with vectors of large, even entries, of which n is +-1 in either kind.

        Raises:
            LanguageModelError: it normalises in a way of its own, or d_model is odd.
        """
        if d_model % 2:
            raise LanguageModelError(f"a norm of {d_model} channels cannot be probed")
        module = float32_copy(module)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        signs = torch.ones(d_model, device=device)
        signs[1::2] = -1
        probes = (LARGE * signs, -LARGE * signs, LARGE * signs.abs(), SMALL * signs)
        with torch.no_grad():
            up, down, flat, small = (module(row[None, None])[0, 0].double() for row in probes)
        weight, bias = signs * (up - down) / 2, (up + down) / 2
        centred = not torch.allclose(
            flat, weight + bias, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE
        )
        if centred and not torch.allclose(flat, bias, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE):
            raise LanguageModelError(f"{type(module).__name__} is no norm that is known")
        share = float((signs * (small - bias)) @ weight / weight.square().sum().clamp(min=1e-300))
        eps = SMALL**2 * (1 / share**2 - 1) if share > 0 else 0.0
        return cls(weight, bias, centred, float(f"{max(eps, 0.0):.4g}"))

    def output(self, h: Tensor) -> Tensor:
        """Return its output for inputs [..., d_model], in their dtype."""
        h = self.centre(h)
        scale = (h.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return h * scale * self.weight.to(h) + self.bias.to(h)

    def apply(self, h: Tensor) -> Tensor:
        """Return its output for inputs [n, d_model], without its bias."""
        h = self.centre(h)
        return h / rms(h) * self.weight.to(h)

    def centre(self, h: Tensor) -> Tensor:
        """Return h [..., d_model] without its mean, where the norm takes that off."""
        return h - h.mean(dim=-1, keepdim=True) if self.centred else h


def rms(h: Tensor) -> Tensor:
    """Return the root mean square of h [..., d_model], [..., 1]."""
    return h.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)


class NormModules(NamedTuple):
    """Modules of a model that norm what goes into and comes out of an attention layer."""

    before: nn.Module | None
    """Norm whose output the layer reads"""
    after: nn.Module | None
    """Norm of the layer's own output, before it is added to the residual stream"""
    last: nn.Module | None
    """Norm before the unembedding"""


@torch.no_grad()
def norm_modules(model: Any, site: AttentionSite) -> NormModules:
    """Return the norms around an attention layer, found by running the model on a few tokens.

    Args:
        model: causal language model of transformers; layers after the site's are not needed, but
            for the norm before the unembedding.
        site: the layer.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # of norms: module, input and output
    ends: dict[str, Tensor] = {}

    def norm(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, args[0], output))

    def layer(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        ends.update(x=module_input(args, kwargs), y=module_output(output))

    def unembedding(module: nn.Module, args: Any) -> None:
        ends["last"] = args[0]
        raise Enough

    hooks = [m.register_forward_hook(norm) for m in model.modules() if "Norm" in type(m).__name__]
    hooks.append(site.module.register_forward_hook(layer, with_kwargs=True))
    if (head := model.get_output_embeddings()) is not None:
        hooks.append(head.register_forward_pre_hook(unembedding))
    _run(model, torch.arange(FEW_TOKENS)[None] % len(model.get_input_embeddings().weight), hooks)
    return NormModules(
        before=next((m for m, _, out in calls if _same(out, ends["x"])), None),
        after=next((m for m, h, _ in calls if _same(h, ends["y"])), None),
        last=next((m for m, _, out in reversed(calls) if _same(out, ends.get("last"))), None),
    )


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


class LinearNorm(NamedTuple):
    """A norm to first order, at the mean length of what it reads in some text."""

    norm: Norm
    per_length: float
    """Mean of 1 / rms(h) over the tokens of the text"""

    def direction(self, vectors: Tensor) -> Tensor:
        """Return what vectors [n, d_model] that are added to its input add to its output."""
        return self.norm.centre(vectors) * self.norm.weight.to(vectors) * self.per_length


class Language(NamedTuple):
    """Embeddings and norms between tokens and an attention layer, and between it and the logits."""

    before: Norm | None
    """Norm whose output the layer reads"""
    after: LinearNorm | None
    """Norm of the layer's own output, where the model has one"""
    last: LinearNorm
    """Norm before the unembedding"""
    embedding: Tensor
    """[n_vocab, d_model]"""
    unembedding: Tensor
    """[n_vocab, d_model]"""

    def to_logits(self, vectors: Tensor) -> Tensor:
        """Return what vectors [n, d_model] added to y do to the logits directly, [n, n_vocab].

        The change is relative to the mean over the vocabulary, on which no probability depends. It
        goes through the mean length of what the norms read, and ends before a cap of the logits,
        if the model has one.
        """
        if self.after is not None:
            vectors = self.after.direction(vectors)
        logits = self.last.direction(vectors) @ self.unembedding.T
        return logits - logits.mean(dim=-1, keepdim=True)

    def embedded(self) -> Tensor:
        """Return what the layer reads of a token's embedding alone, [n_vocab, d_model]."""
        return self.embedding if self.before is None else self.before.apply(self.embedding)


@torch.no_grad()
def surroundings(model: Any, site: AttentionSite, tokens: Tensor) -> Language | None:
    """Return what is around a layer; None where the unembedding or the last norm is not found.

    Args:
        model: causal language model of transformers.
        site: the layer.
        tokens: some text, over which lengths are averaged, [n, seq].
    """
    if model.get_output_embeddings() is None:
        return None
    modules = norm_modules(model, site)
    norms = {module: norm for module in modules if (norm := _known(module, model)) is not None}
    if modules.last not in norms:
        return None
    linear = _at_mean_length(model, norms, tokens)
    return Language(
        before=norms.get(modules.before),
        after=linear.get(modules.after),
        last=linear[modules.last],
        embedding=model.get_input_embeddings().weight.detach().float(),
        unembedding=model.get_output_embeddings().weight.detach().float(),
    )


def _known(module: nn.Module | None, model: Any) -> Norm | None:
    """Return the norm that a module computes, None where it is no known one."""
    if module is None:
        return None
    try:
        return Norm.read(module, model.config.get_text_config().hidden_size)
    except LanguageModelError:
        return None


def _at_mean_length(
    model: Any, norms: dict[nn.Module | None, Norm], tokens: Tensor
) -> dict[nn.Module | None, LinearNorm]:
    """Run the model on tokens [n, seq]; return norms at the mean length of what they read."""
    found: dict[nn.Module | None, LinearNorm] = {}

    def measure(module: nn.Module, args: Any) -> None:
        norm = norms[module]
        h = args[0].float().flatten(0, -2)
        found[module] = LinearNorm(norm, float((1 / rms(norm.centre(h))).mean()))

    def unembedding(module: nn.Module, args: Any) -> None:
        raise Enough  # logits of a whole text may take gigabytes

    hooks = [module.register_forward_pre_hook(measure) for module in norms if module is not None]
    hooks.append(model.get_output_embeddings().register_forward_pre_hook(unembedding))
    _run(model, tokens, hooks)
    return found


def _run(model: Any, tokens: Tensor, hooks: list[RemovableHandle]) -> None:
    """Run a model on tokens [n, seq], as far as the hooks let it, and remove the hooks."""
    try:
        with suppress(Enough):
            model(input_ids=tokens.long().to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def in_chunks(n_rows: int, width: int, elements: int = 1 << 26) -> Iterator[slice]:
    """Yield runs of rows such that rows times width stays bounded."""
    step = max(1, elements // max(width, 1))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
