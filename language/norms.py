"""The language model around the layer, as far as reading a head needs it.

What lies between a head and the logits is a norm (two, where the attention's output has its own)
and the unembedding; what lies between an embedding and a head's value is the norm before the
attention. Norms are found by what goes in and out of them and fitted to that, so no model family
is spelled out:

    RMS     n(h) = h / sqrt(mean(h^2))                         out = gain * n(h) + bias
    layer   n(h) = (h - mean(h)) / sqrt(mean((h - mean(h))^2))
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..errors import ExchangeError
from .blocks import AttentionSite
from .edit import module_input, module_output

FIT_ERROR = 2e-2
"""Relative error up to which a fitted norm is taken for the model's; bfloat16 has 4e-3."""


class Norm(NamedTuple):
    """A norm of the model, fitted to what it did."""

    centred: bool
    """Whether it takes the mean off, as LayerNorm does"""
    gain: Tensor
    """[d_model]"""
    per_length: float
    """Mean of 1 / sqrt(mean(n^2)) over tokens: what it multiplies by, besides the gain"""

    def direction(self, vectors: Tensor) -> Tensor:
        """Return what becomes of vectors added to its input, to first order, [n, d_model]."""
        return self._centre(vectors) * self.gain * self.per_length

    def apply(self, h: Tensor) -> Tensor:
        """Return its output for inputs [n, d_model], without its bias."""
        h = self._centre(h)
        return h / h.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30) * self.gain

    def _centre(self, h: Tensor) -> Tensor:
        return h - h.mean(dim=-1, keepdim=True) if self.centred else h

    @classmethod
    def fit(cls, h: Tensor, out: Tensor) -> "Norm | None":
        """Return the norm that makes out of h, [tokens, d_model]; None if neither kind does."""
        for centred in (False, True):
            shifted = h - h.mean(dim=-1, keepdim=True) if centred else h
            length = shifted.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
            n = shifted / length
            spread = n - n.mean(dim=0)
            gain = (spread * (out - out.mean(dim=0))).sum(dim=0) / spread.square().sum(dim=0)
            bias = (out - gain * n).mean(dim=0)
            error = (gain * n + bias - out).norm() / out.norm()
            if error < FIT_ERROR:
                return cls(centred, gain, float((1 / length).mean()))
        return None


class Language(NamedTuple):
    """What is around one attention layer."""

    before: Norm | None
    """The norm whose output the layer reads"""
    after: Norm | None
    """Of the layer's own output, where the model has one"""
    last: Norm
    """The norm before the unembedding"""
    embedding: Tensor
    """[n_vocab, d_model]"""
    unembedding: Tensor
    """[n_vocab, d_model]"""

    def to_logits(self, vectors: Tensor) -> Tensor:
        """Return what vectors [n, d_model] added to y do to the logits directly, [n, n_vocab].

        Relative to the mean over the vocabulary, which no probability depends on; through the mean
        length of what the norms see; before a cap of the logits, if the model has one.
        """
        if self.after is not None:
            vectors = self.after.direction(vectors)
        logits = self.last.direction(vectors) @ self.unembedding.T
        return logits - logits.mean(dim=-1, keepdim=True)

    def embedded(self) -> Tensor:
        """Return what the layer reads of a token's embedding alone, [n_vocab, d_model]."""
        return self.embedding if self.before is None else self.before.apply(self.embedding)


class Seen(NamedTuple):
    """What went in and out of a norm."""

    h: Tensor
    out: Tensor


class _Watch:
    """Hooks on a model's norms, a layer and the unembedding."""

    def __init__(self, model: Any, site: AttentionSite) -> None:
        self.norms: list[Seen] = []
        self.x = self.y = self.final = torch.empty(0)
        self._model, self._site = model, site
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        def norm(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(output, Tensor) and args[0].shape == output.shape:
                self.norms.append(Seen(args[0].detach(), output.detach()))

        def layer(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.x = module_input(args, kwargs).detach()
            self.y = module_output(output).detach()

        def head(module: nn.Module, args: Any) -> None:
            self.final = args[0].detach()

        norms = [m for m in self._model.modules() if "Norm" in type(m).__name__]
        self._handles = [each.register_forward_hook(norm) for each in norms]
        self._handles.append(self._site.module.register_forward_hook(layer, with_kwargs=True))
        unembed = self._model.get_output_embeddings()
        self._handles.append(unembed.register_forward_pre_hook(head))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def surroundings(model: Any, site: AttentionSite, tokens: Tensor) -> Language | None:
    """Return what is around a layer; None of a model whose unembedding or last norm is not found.

    Args:
        model: causal language model of transformers.
        site: the layer.
        tokens: some text to run it on, [n, seq].
    """
    if model.get_output_embeddings() is None:
        return None
    with _Watch(model, site) as seen:
        model(input_ids=tokens.long().to(model.device), use_cache=False)
    last = _fitted(seen.norms, out=seen.final)
    if last is None:
        return None
    return Language(
        before=_fitted(seen.norms, out=seen.x),
        after=_fitted(seen.norms, h=seen.y),
        last=last,
        embedding=model.get_input_embeddings().weight.detach().float(),
        unembedding=model.get_output_embeddings().weight.detach().float(),
    )


def _fitted(
    norms: list[Seen], *, h: Tensor | None = None, out: Tensor | None = None
) -> Norm | None:
    """Return the norm that had this input or output, if there is one."""
    for seen in reversed(norms):
        one, wanted = (seen.h, h) if out is None else (seen.out, out)
        if wanted is not None and one.shape == wanted.shape and torch.equal(one, wanted):
            return Norm.fit(*(part.float().flatten(0, -2) for part in seen))
    return None


def in_chunks(n_rows: int, width: int, elements: int = 1 << 26) -> Iterator[slice]:
    """Yield runs of rows such that rows times width stays bounded."""
    step = max(1, elements // max(width, 1))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


LARGE = 1024.0
"""Length of what a norm is probed with, next to which its eps is nothing; a power of two."""


class Affine(NamedTuple):
    """What a norm does after it has normalised."""

    weight: Tensor
    """[d_model]"""
    bias: Tensor
    """[d_model]"""
    centred: bool
    """Whether it takes the mean off, as LayerNorm does"""


@torch.no_grad()
def norm_before(model: Any, site: AttentionSite) -> Affine:
    """Return the norm whose output an attention layer reads.

    Args:
        model: causal language model of transformers, in float32.
        site: the layer.

    Raises:
        ExchangeError: there is no such norm, one between the attention and the residual stream as
            well, or it normalises in a way of its own.
    """
    outputs: list[tuple[nn.Module, Tensor, Tensor]] = []
    ends: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            outputs.append((module, args[0], output))

    def attention(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        ends.extend([module_input(args, kwargs), module_output(output)])

    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    handles = [module.register_forward_hook(watch) for module in norms]
    handles.append(site.module.register_forward_hook(attention, with_kwargs=True))
    try:
        n_vocab = model.get_input_embeddings().weight.shape[0]
        tokens = torch.arange(8, device=model.device)[None] % n_vocab
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    x, y = ends
    if any(before.shape == y.shape and torch.equal(before, y) for _, before, _ in outputs):
        raise ExchangeError(
            f"layer {site.layer} norms the attention's output once more; hook_attn_out lies after "
            "that norm, which no weights can take back"
        )
    for module, _, output in outputs:
        if output.shape == x.shape and torch.equal(output, x):
            return _affine(module, x)
    raise ExchangeError(f"layer {site.layer} reads no norm's output; leave --model out")


def _affine(norm: nn.Module, like: Tensor) -> Affine:
    """Probe a norm with two vectors of large, even entries: n is +-1 there, in either kind."""
    signs = torch.ones(like.shape[-1], device=like.device, dtype=like.dtype)
    signs[1::2] = -1
    if len(signs) % 2:
        raise ExchangeError(f"a norm of {len(signs)} channels cannot be probed; leave --model out")
    up, down = (norm(LARGE * s[None, None])[0, 0].double() for s in (signs, -signs))
    weight, bias = signs * (up - down) / 2, (up + down) / 2
    flat = norm(torch.full_like(like[:1, :1], LARGE))[0, 0].double()
    centred = not torch.allclose(flat, weight + bias, rtol=1e-3, atol=1e-3)
    if centred and not torch.allclose(flat, bias, rtol=1e-3, atol=1e-3):
        raise ExchangeError(f"{type(norm).__name__} is no norm that is known; leave --model out")
    return Affine(weight, bias, centred)
