"""Attention layers of a loaded language model, found by what its modules are.

The layers of a model are its one list of `num_hidden_layers` blocks; the attention of a block is
the module in it whose class is called so and that has projections of its own.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..errors import AttachError

OTHER_SENSES = ("vision", "visual", "audio", "image")
"""Parts of a multimodal model that read no text."""


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

    Args:
        model: causal language model of transformers.
        layers: counted from 0.

    Raises:
        AttachError: a layer is outside the model, or no attention is found in it.
    """
    n_layers = text_config(model).num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < n_layers]
    if outside:
        raise AttachError(f"layer {outside[0]} is outside the model; it has 0-{n_layers - 1}")
    names = attention_paths(model)
    lacking = [layer for layer in layers if layer not in names]
    if lacking:
        having = ", ".join(map(str, sorted(names)))
        raise AttachError(f"layer {lacking[0]} has no attention; these layers have: {having}")
    return [AttentionSite(i, names[i], model.get_submodule(names[i])) for i in layers]


def attention_paths(model: Any) -> dict[int, str]:
    """Return the dotted name of every layer's attention module, where it has one.

    Raises:
        AttachError: none has.
    """
    n_layers = text_config(model).num_hidden_layers
    for path, blocks in model.named_modules():
        other = any(sense in path for sense in OTHER_SENSES)
        if not other and isinstance(blocks, nn.ModuleList) and len(blocks) == n_layers:
            found = {i: name for i, block in enumerate(blocks) if (name := _attention(block))}
            if found:
                return {layer: f"{path}.{layer}.{name}" for layer, name in found.items()}
    raise AttachError(
        f"models of type {model.config.model_type} have no attention that lorsa can find"
    )


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


def _attention(block: nn.Module) -> str | None:
    """Return the name of a block's attention module: the outermost with weights of its own."""
    for name, module in block.named_modules():
        called_so = "Attention" in type(module).__name__ and "cross" not in name.lower()
        if name and called_so and any(child._parameters for child in module.children()):
            return str(name)
    return None
