"""The norm before an attention layer, and Lorsas that read it before its weight or after.

    n = (h - mean(h)) / std(h), or h / rms(h)       TransformerLens' ln1.hook_normalized, in models
                                                    whose weights it has processed
    x = w n + b                                     the layer's input

A Lorsa that reads n becomes one that reads x by W / w and, in the biases, -(b / w) W; the other way
by W w and + b W.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import AttentionSite, Lorsa, module_input, module_output
from .errors import ExchangeError

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


@torch.no_grad()
def read_after(lorsa: Lorsa, norm: Affine) -> None:
    """Change a Lorsa of n in place into one of x; ExchangeError if a weight of the norm is 0."""
    if bool((norm.weight == 0).any()):
        channel = int((norm.weight == 0).nonzero()[0])
        raise ExchangeError(
            f"the norm's weight of channel {channel} is 0; what was read there is lost"
        )
    _change(lorsa, 1 / norm.weight, -norm.bias / norm.weight)


@torch.no_grad()
def read_before(lorsa: Lorsa, norm: Affine) -> None:
    """Change a Lorsa of x in place into one of n."""
    _change(lorsa, norm.weight, norm.bias)


def _change(lorsa: Lorsa, factor: Tensor, shift: Tensor) -> None:
    """Put factor * input + shift in place of the input; in float64."""
    factor, shift = factor.cpu(), shift.cpu()
    for name in ("W_Q", "W_K"):
        weight, bias = lorsa.get_parameter(name), lorsa.get_parameter("b" + name[1:])
        bias.add_(torch.einsum("d,hde->he", shift, weight.double()))
        weight.copy_(weight.double() * factor[:, None])
    lorsa.b_V.add_(lorsa.W_V.double() @ shift)
    lorsa.W_V.copy_(lorsa.W_V.double() * factor)
