"""Check that attention is causal where its geometry is unknown: no token reads a later one."""

from collections.abc import Collection

import torch
from torch import Tensor

from ..errors import LanguageModelError
from .capture import Capture

LIMIT = 1e-2
"""Largest relative change of y before a token that is changed; half precision costs less."""


def require_causal(capture: Capture, sequence: Tensor, layers: Collection[int]) -> None:
    """Raise LanguageModelError unless y of some layers is the same whatever the last token is.

    Args:
        capture: hooks on a language model.
        sequence: token ids, [n_ctx].
        layers: layers to look at; of the others the self-check knows it.
    """
    if not layers:
        return
    changed = sequence.clone()
    changed[-1] = sequence[0] if sequence[0] != sequence[-1] else (sequence[-1] + 1) % 2
    one, other = (
        {layer: call.y[0, :-1].float() for layer, call in capture.calls(tokens[None]).items()}
        for tokens in (sequence, changed)
    )
    for layer in layers:
        size = one[layer].norm().clamp_min(torch.finfo(torch.float32).tiny)
        if float((one[layer] - other[layer]).norm() / size) > LIMIT:
            raise LanguageModelError(
                f"layer {layer}: what its attention gives for a token depends on later tokens; "
                "lorsa takes causal language models only"
            )
