"""Attention layers of a loaded language model, found by what its modules compute.

The layers of a model are its one list of `num_hidden_layers` blocks; the attention of a block is
what `traced.py` finds in it.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..errors import AttachError
from .traced import ADDED, Found, find_attention


class AttentionSite(NamedTuple):
    """One attention layer of a loaded model."""

    layer: int
    """Counted from 0"""
    name: str
    """Dotted name of the module in the model"""
    module: nn.Module
    """Module that takes x, as keyword or first argument, and gives y or a tuple beginning with y"""


def attention_sites(model: Any, layers: Sequence[int]) -> list[AttentionSite]:
    """Return the attention modules of some layers of a loaded model, in order.

    The model is run once on a few tokens to find them.

    Args:
        model: causal language model of transformers.
        layers: counted from 0.

    Raises:
        AttachError: a layer is outside the model, no attention is found in it, or what its
            attention gives is not what the layer adds to the residual stream.
    """
    n_layers = text_config(model).num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < n_layers]
    if outside:
        raise AttachError(f"layer {outside[0]} is outside the model; it has 0-{n_layers - 1}")
    found = attention_modules(model)
    require_usable(found, layers)
    names = {layer: found[layer].name for layer in layers}
    return [AttentionSite(i, names[i], model.get_submodule(names[i])) for i in layers]


def attention_modules(model: Any) -> dict[int, Found]:
    """Return what computes attention in each layer of a model, where there is such a module.

    Raises:
        AttachError: there is none, or the model does not run.
    """
    kind, n_layers = model.config.model_type, text_config(model).num_hidden_layers
    try:
        modules = find_attention(model)
    except Exception as error:  # whatever a model's forward leads to
        reason = " ".join(str(error).split())[:200]
        raise AttachError(
            f"this model of type {kind} does not run on a few tokens ({type(error).__name__}: "
            f"{reason})"
        ) from error
    lists = block_lists(model, n_layers)
    found: dict[int, Found] = {}
    for module in modules:
        if (layer := _layer_of(module.name, lists)) is not None:
            found.setdefault(layer, module)
    if not found:
        where = f" in a list of its {n_layers} layers" if modules else ""
        raise AttachError(f"models of type {kind} have no attention that lorsa can find{where}")
    return dict(sorted(found.items()))


def require_usable(found: dict[int, Found], layers: Iterable[int]) -> None:
    """Raise AttachError unless all layers have attention whose output is what they add."""
    usable = [layer for layer, module in found.items() if why_not(module) is None]
    for layer in layers:
        reason = f": {why}" if layer in found and (why := why_not(found[layer])) else None
        if layer not in found:
            reason = " has no attention"
        if reason is not None:
            others = f"; give --layers out of {','.join(map(str, usable))}" if usable else ""
            raise AttachError(f"layer {layer}{reason}{others}")


def why_not(module: Found) -> str | None:
    """Return why a module is no attention layer that can be stored; None if it is one."""
    if module.fate != ADDED:
        return (
            f"the output of {module.name}, where its attention is, {module.fate}, so it is not "
            "what the layer adds to the residual stream"
        )
    if module.n_calls != 1:
        return f"{module.name}, where its attention is, runs {module.n_calls} times in a pass"
    return None


def block_lists(model: Any, n_layers: int) -> list[str]:
    """Return the dotted names of a model's lists of as many modules as it has layers."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]


def _layer_of(name: str, lists: list[str]) -> int | None:
    """Return the layer in which a module lies; None if it lies in none of the lists."""
    for blocks in lists:
        if name.startswith(f"{blocks}."):
            return int(name.removeprefix(f"{blocks}.").partition(".")[0])
    return None


def text_config(model: Any) -> Any:
    """Return transformers' config of the part of a model that reads text.

    Raises:
        AttachError: it has none.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise AttachError(
            f"{type(model).__name__} is no language model of transformers; give one, such as "
            "AutoModelForCausalLM.from_pretrained makes"
        )
    return config.get_text_config()


def float32_copy(module: nn.Module) -> Any:
    """Return a copy of a module with its parameters in float32 and without its hooks."""
    module = copy.deepcopy(module).float()
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    return module
