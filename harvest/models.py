"""Load a language model and its tokenizer with transformers."""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .aliases import ModelPath
from .errors import HarvestError

MODEL_DTYPES = ("auto", "float32", "bfloat16", "float16")


class LanguageModel(NamedTuple):
    """A causal language model, ready to run."""

    model: Any
    """transformers' model, in eval mode on its device"""
    facts: dict[str, Any]
    """What the store's manifest says of it"""


def load_config(path: ModelPath) -> Any:
    """Return transformers' config of a model without its weights; HarvestError if there is none."""
    return _attempt(path, AutoConfig.from_pretrained)


def load_tokenizer(path: ModelPath, *, needed: bool = True) -> Any:
    """Return the tokenizer of a model; if there is none, HarvestError, or None if not needed."""
    try:
        tokenizer = _attempt(path, AutoTokenizer.from_pretrained)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            # transformers makes an empty one where there are no files
            raise HarvestError(f"model {path.id} has no tokenizer; add its tokenizer.json")
    except HarvestError:
        if needed:
            raise
        return None
    return tokenizer


def load_model(path: ModelPath, config: Any, *, dtype: str, device: str) -> LanguageModel:
    """Load a model for inference.

    Args:
        path: from `aliases.resolve`.
        config: from `load_config`.
        dtype: of weights and arithmetic; "auto" is the model's own on a GPU and float32 on a CPU,
            where half precision is hundreds of times slower.
        device: where it runs.

    Raises:
        HarvestError: it cannot be loaded, or its files lack weights.
    """
    chosen = "float32" if dtype == "auto" and device == "cpu" else dtype
    model, info = _attempt(
        path,
        AutoModelForCausalLM.from_pretrained,
        config=config,
        dtype=chosen if chosen == "auto" else getattr(torch, chosen),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # or they are not named
    )
    # transformers would go on with random numbers in their place
    lacking = sorted([*info["missing_keys"], *map(_key, info["mismatched_keys"])])
    if lacking:
        raise HarvestError(
            f"model {path.id} lacks weights that its config.json asks for, or has them in another "
            f"shape: {', '.join(lacking[:3])}"
        )
    model = model.to(device).eval()
    return LanguageModel(model, _facts(model, path))


def _key(mismatch: Any) -> str:
    """Return the name of a weight of another shape; transformers 4 gives it without the shapes."""
    return mismatch if isinstance(mismatch, str) else str(mismatch[0])


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Return what the store's manifest says of a tokenizer; None is for every fact of none."""
    if tokenizer is None:
        return dict.fromkeys(("class", "vocabulary_sha256", "bos_token_id", "eos_token_id")) | {
            "pad_token_id": None,
            "special_token_ids": [],
        }
    vocabulary = "\n".join(f"{token}\t{i}" for token, i in sorted(tokenizer.get_vocab().items()))
    return {
        "class": type(tokenizer).__name__,
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "special_token_ids": sorted(tokenizer.all_special_ids),
    }


def _facts(model: Any, path: ModelPath) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {
        "id": path.id,
        "revision": path.revision,
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_vocab": config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": config._attn_implementation,
        "transformers_version": transformers.__version__,
    }


def _attempt(path: ModelPath, load: Callable[..., Any], **settings: Any) -> Any:
    """Call a from_pretrained of transformers and turn its failures into one line."""
    try:
        return load(
            path.name,
            gguf_file=path.gguf_file,
            revision=path.revision or "main",
            local_files_only=path.offline,
            **settings,
        )
    except Exception as error:  # whatever damaged files lead to; LORSA_DEBUG=1 shows it
        raise HarvestError(_one_line(path, error)) from error


def _one_line(path: ModelPath, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if path.offline and isinstance(error, OSError):
        return (
            f"model {path.id} is not on this machine and the Hub cannot be reached; "
            "give a local folder or .gguf file, or connect and try again"
        )
    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return f"model {path.id} is gated; accept its terms on the Hub and run: hf auth login"
    if path.gguf_file is not None and find_spec("gguf") is None:
        return f"model {path.id} needs the package gguf; run: pip install gguf"
    return f"model {path.id} cannot be loaded: {reason[:300]}"
