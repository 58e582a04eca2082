"""Where attention sits in a language model, found by what its modules are.

The layers of a model are its one list of `num_hidden_layers` blocks; the attention of a block is
the module in it whose class is called so and that has projections of its own. What such a module
computes is read by `readings.py` and checked by `selfcheck.py`.
"""

from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from .errors import HarvestError

SUPPORTED = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""Model types that are tested, so that one that cannot be read is refused. Any other is tried."""

OTHER_SENSES = ("vision", "visual", "audio", "image")
"""Parts of a multimodal model that read no text."""


class AttentionSite(NamedTuple):
    """One attention layer of a loaded model."""

    layer: int
    """Counted from 0"""
    name: str
    """Dotted name of the module in the model"""
    module: nn.Module
    """Takes x (keyword or first argument), gives y (or a tuple that starts with it)"""


def is_supported(config: Any) -> bool:
    """Tell whether models of a transformers config are tested."""
    return config.get_text_config().model_type in SUPPORTED


def require_decoder(config: Any) -> None:
    """Raise HarvestError unless a transformers config is that of a causal language model."""
    kind = config.model_type
    why = None
    if getattr(config, "is_encoder_decoder", False):
        why = "have an encoder and a decoder"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        why = "are encoders"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        why = f"are none that transformers {transformers.__version__} has as causal language models"
    if why is not None:
        raise HarvestError(
            f"models of type {kind} {why}; give a causal language model, such as qwen2-0.5b"
        )


def attention_names(config: Any) -> dict[int, str]:
    """Return the layers of a model that have attention, with the dotted names of their modules.

    The model is laid out without memory for its weights: its configuration is enough.

    Raises:
        HarvestError: it is no causal language model, or has no attention that can be found.
    """
    require_decoder(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a configuration leads to
        reason = " ".join(str(error).split())[:300]
        raise HarvestError(f"a model of this config.json cannot be made: {reason}") from error
    return _names(model)


def require_attention(names: dict[int, str], layers: list[int]) -> None:
    """Raise HarvestError unless all layers are among those with attention."""
    lacking = [layer for layer in layers if layer not in names]
    if lacking:
        having = ",".join(map(str, sorted(names)))
        raise HarvestError(f"layer {lacking[0]} has no attention; give --layers out of {having}")


def attention_sites(model: Any, layers: list[int]) -> list[AttentionSite]:
    """Return the attention modules of some layers of a loaded model, in order.

    Raises:
        HarvestError: a layer is outside the model, or has no attention.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    if max(layers) >= n_layers:
        raise HarvestError(f"layer {max(layers)} is outside the model; it has 0-{n_layers - 1}")
    names = _names(model)
    require_attention(names, layers)
    return [AttentionSite(i, names[i], model.get_submodule(names[i])) for i in layers]


def decoder_of(model: Any, site: AttentionSite) -> tuple[Any, Any]:
    """Return the module that holds the list of layers in which a site lies, and that list."""
    path = site.name.partition(f".{site.layer}.")[0]
    return model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)


def _names(model: Any) -> dict[int, str]:
    """Return the dotted name of every layer's attention module, where it has one."""
    n_layers = model.config.get_text_config().num_hidden_layers
    for path, blocks in model.named_modules():
        other = any(sense in path for sense in OTHER_SENSES)
        if not other and isinstance(blocks, nn.ModuleList) and len(blocks) == n_layers:
            found = {i: name for i, block in enumerate(blocks) if (name := _attention(block))}
            if found:
                return {layer: f"{path}.{layer}.{name}" for layer, name in found.items()}
    raise HarvestError(
        f"models of type {model.config.model_type} have no attention that lorsa can find"
    )


def _attention(block: nn.Module) -> str | None:
    """Return the name of a block's attention module: the outermost with weights of its own."""
    for name, module in block.named_modules():
        called_so = "Attention" in type(module).__name__ and "cross" not in name.lower()
        if name and called_so and any(child._parameters for child in module.children()):
            return str(name)
    return None
