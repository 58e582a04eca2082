"""The norm before an attention layer, and Lorsas that read it before its weight or after.

    n = (h - mean(h)) / std(h), or h / rms(h)       TransformerLens' ln1.hook_normalized, in models
                                                    whose weights it has processed
    x = w n + b                                     the layer's input

A Lorsa that reads n becomes one that reads x by W / w and, in the biases, -(b / w) W; the other way
by W w and + b W.
"""

from typing import Any

import torch
from torch import Tensor

from ..dictionaries.lorsa.module import Lorsa
from ..errors import ExchangeError, LanguageModelError
from ..language.blocks import AttentionSite
from ..language.norms import Norm, norm_modules


def norm_before(model: Any, site: AttentionSite) -> Norm:
    """Return the norm whose output an attention layer reads, exact in float64.

    Args:
        model: causal language model of transformers, at least as far as the layer.
        site: the layer.

    Raises:
        ExchangeError: there is no such norm, one between the attention and the residual stream as
            well, or it normalises in a way of its own.
    """
    modules = norm_modules(model, site)
    if modules.after is not None:
        raise ExchangeError(
            f"layer {site.layer} norms the attention's output once more; hook_attn_out lies after "
            "that norm, which no weights can take back"
        )
    if modules.before is None:
        raise ExchangeError(
            f"layer {site.layer} reads no norm's output; leave the model out (--model none)"
        )
    try:
        return Norm.read(modules.before, model.config.get_text_config().hidden_size)
    except LanguageModelError as error:
        raise ExchangeError(f"{error}; leave the model out (--model none)") from None


@torch.no_grad()
def read_after(lorsa: Lorsa, norm: Norm) -> None:
    """Change a Lorsa of n in place into one of x.

    Raises:
        ExchangeError: a weight of the norm is 0.
    """
    if bool((norm.weight == 0).any()):
        channel = int((norm.weight == 0).nonzero()[0])
        raise ExchangeError(
            f"the norm's weight of channel {channel} is 0; what was read there is lost"
        )
    _change(lorsa, 1 / norm.weight, -norm.bias / norm.weight)


@torch.no_grad()
def read_before(lorsa: Lorsa, norm: Norm) -> None:
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
