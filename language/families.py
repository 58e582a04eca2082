"""Families of language models: which are tested, and which of their layers have attention.

What an attention module computes is read by `readings.py` and checked by `selfcheck.py`.
"""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..errors import AttachError, LanguageModelError
from .blocks import attention_paths

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


def attention_names(config: Any) -> dict[int, str]:
    """Return the layers of a model that have attention, with the dotted names of their modules.

    The model is built without memory for its weights: its configuration is enough.

    Raises:
        LanguageModelError: it is no causal language model, or has no attention that can be found.
    """
    require_decoder(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a configuration leads to
        reason = " ".join(str(error).split())[:300]
        raise LanguageModelError(f"a model of this config.json cannot be made: {reason}") from error
    try:
        return attention_paths(model)
    except AttachError as error:
        raise LanguageModelError(str(error)) from None


def require_attention(names: dict[int, str], layers: list[int]) -> None:
    """Raise LanguageModelError unless all layers are among those with attention."""
    lacking = [layer for layer in layers if layer not in names]
    if lacking:
        having = ",".join(map(str, sorted(names)))
        raise LanguageModelError(
            f"layer {lacking[0]} has no attention; give --layers out of {having}"
        )
