"""Families of language models: which are tested, and which of their layers have attention.

What an attention module computes is read by `readings.py` and checked by `selfcheck.py`.
"""

import copy
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..errors import AttachError, LanguageModelError
from .blocks import (
    Block,
    attention_modules,
    block_lists,
    find_blocks,
    require_usable,
    why_not,
)
from .traced import ADDED, Found, modules_after

SUPPORTED = (
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "mpt",
    "olmo",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""Model types that are tested, so that one that cannot be read is refused. Any other is tried."""


def is_supported(config: Any) -> bool:
    """Return whether models of a transformers config are tested."""
    return config.get_text_config().model_type in SUPPORTED


def require_decoder(config: Any) -> None:
    """Raise LanguageModelError unless a transformers config is that of a causal language model."""
    kind = config.model_type
    why = None
    if getattr(config, "is_encoder_decoder", False):
        why = "have an encoder and a decoder"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        why = "are encoders"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        why = f"are none that transformers {transformers.__version__} has as causal language models"
    if why is not None:
        raise LanguageModelError(
            f"models of type {kind} {why}; give a causal language model, such as qwen2-0.5b"
        )


def attention_of(config: Any) -> dict[int, Found]:
    """Return what computes attention in the layers of a model, where there is such a module.

    The model is built without memory for its weights: its configuration is enough. Where it does
    not run so, every layer is named, and which have attention shows when the weights are there.

    Raises:
        LanguageModelError: it is no causal language model, or has no attention that can be found.
    """
    require_decoder(config)
    model = empty_model(config)
    try:
        return attention_modules(model)
    except AttachError as error:
        n_layers = config.get_text_config().num_hidden_layers
        blocks = block_lists(model, n_layers)[:1]
        if not blocks:
            kind = config.model_type
            raise LanguageModelError(
                f"models of type {kind} have no list of their {n_layers} layers that lorsa can find"
            ) from None
        if error.__cause__ is None:
            raise LanguageModelError(str(error)) from None
    return {i: Found(f"{name}.{i}", ADDED, 1) for name in blocks for i in range(n_layers)}


def blocks_of(config: Any) -> dict[int, Block]:
    """Return the blocks of a model, by layer, from its configuration alone.

    Nothing is returned where it does not run without weights; `find_blocks` tells when they are
    there.
    """
    try:
        return find_blocks(empty_model(config))
    except AttachError:
        return {}


def attention_names(found: dict[int, Found]) -> dict[int, str]:
    """Return the layers whose attention can be stored, with the dotted names of their modules.

    Args:
        found: as `attention_of` returned it.

    Raises:
        LanguageModelError: there is none.
    """
    names = {layer: module.name for layer, module in found.items() if why_not(module) is None}
    if not names:
        require_attention(found, list(found))
    return names


def require_attention(found: dict[int, Found], layers: list[int]) -> None:
    """Raise LanguageModelError unless all layers have attention that can be stored."""
    try:
        require_usable(found, layers)
    except AttachError as error:
        raise LanguageModelError(str(error)) from None


def modules_after_layer(config: Any, layer: int) -> set[str]:
    """Return the names of the modules that run only after the attention of a layer.

    Where it does not show without weights, these are the unembedding alone.
    """
    model = empty_model(config)
    try:
        return modules_after(model, attention_modules(model)[layer].name)
    except Exception:  # whatever a model's forward leads to
        head = model.get_output_embeddings()
        return {name for name, module in model.named_modules() if module is head}


def shortened(config: Any, n_layers: int | None) -> Any:
    """Return a transformers config of a model's first layers alone, if they come out the same.

    Args:
        config: config of the whole model.
        n_layers: how many layers; None keeps all.

    Returns:
        The config as it was where some weight or setting of a layer depends on their number.
    """
    if n_layers is None or n_layers >= config.get_text_config().num_hidden_layers:
        return config
    short = copy.deepcopy(config)
    text = short.get_text_config()
    try:
        text.num_hidden_layers = n_layers
        if getattr(text, "layer_types", None) is not None:
            with suppress(AttributeError):  # some make it of other settings
                text.layer_types = text.layer_types[:n_layers]
        same = _is_beginning(empty_model(short), empty_model(config), n_layers)
    except Exception:  # whatever a configuration that does not fit its model leads to
        return config
    return short if same else config


def _is_beginning(short: Any, whole: Any, n_layers: int) -> bool:
    """Return whether a model is a larger one without its last layers."""
    lists = block_lists(short, n_layers)
    modules = dict(whole.named_modules())
    for name, module in short.named_modules():
        other = modules.get(name)
        in_a_layer = any(name.startswith(f"{blocks}.") for blocks in lists)
        if type(other) is not type(module) or _shapes(other) != _shapes(module):
            return False
        if in_a_layer and _settings(other) != _settings(module):
            return False
    return bool(lists)


def _shapes(module: Any) -> dict[str, Any]:
    """Return the shapes of a module's own weights and buffers."""
    named = {**module._parameters, **module._buffers}
    return {name: None if tensor is None else tensor.shape for name, tensor in named.items()}


def _settings(module: Any) -> dict[str, Any]:
    """Return the plain attributes of a module."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, plain)}


def empty_model(config: Any) -> Any:
    """Return a model of a transformers config, in eval mode, without memory for its weights.

    Raises:
        LanguageModelError: there is no such model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    except Exception as error:  # whatever a configuration leads to
        reason = " ".join(str(error).split())[:300]
        raise LanguageModelError(f"a model of this config.json cannot be made: {reason}") from error
