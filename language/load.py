"""Calls of transformers that load a model or its parts, with failures in one line."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from accelerate import infer_auto_device_map, init_empty_weights
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import LanguageModelError
from ..hub import gated
from ..store.care.info import format_bytes
from .aliases import ModelPath
from .families import modules_after_layer, shortened
from .strangers import require_no_adapter, without_kernels

WEIGHTS_SHARE = 0.8
"""Part of a GPU's free memory that weights may take; the rest is for activations."""


def load_config(path: ModelPath) -> Any:
    """Return transformers' config of a model, without its weights.

    Raises:
        LanguageModelError: there is none, or it cannot be read.
    """
    require_no_adapter(path)
    config = attempt(path, AutoConfig.from_pretrained)
    without_kernels(config)
    return config


def load_model(
    path: ModelPath,
    config: Any,
    *,
    dtype: str,
    devices: Sequence[str],
    n_layers: int | None = None,
) -> Any:
    """Load a model for inference, as `Subject.load` does.

    On a CPU "auto" is float32, as half precision is hundreds of times slower there.
    """
    chosen = "float32" if dtype == "auto" and devices[0] == "cpu" else dtype
    wanted = shortened(config, n_layers)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    where: dict[str, Any] = {"device_map": {"": devices[0]}}
    if path.gguf_file is not None:
        where = {}  # read as a whole before it is placed
    elif devices[0] != "cpu":
        where = _placed(path, wanted, chosen, devices)
    model, info = attempt(
        path,
        AutoModelForCausalLM.from_pretrained,
        config=wanted,
        attn_implementation="eager" if capped else None,  # sdpa knows no softcap
        dtype=chosen if chosen == "auto" else getattr(torch, chosen),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # or they are not named
        **where,
    )
    # transformers puts random numbers in their place
    lacking = sorted([*info["missing_keys"], *map(_key, info["mismatched_keys"])])
    if lacking and n_layers is not None:
        later = modules_after_layer(wanted, n_layers - 1)
        lacking = [name for name in lacking if name.rpartition(".")[0] not in later]
    if lacking:
        raise LanguageModelError(
            f"model {path.id} lacks weights that its config.json asks for, or has them in another "
            f"shape: {', '.join(lacking[:3])}"
        )
    if not where:
        model = model.to(devices[0])
    return model.eval()


def _placed(path: ModelPath, config: Any, dtype: str, devices: Sequence[str]) -> dict[str, Any]:
    """Return how transformers places a model: on the first GPU, or split over all if need be.

    Raises:
        LanguageModelError: the GPUs do not hold it.
    """
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config)
    width = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    n_bytes = sum(p.numel() for p in empty.parameters()) * width.itemsize
    room = [int(torch.cuda.mem_get_info(gpu)[0] * WEIGHTS_SHARE) for gpu in devices]
    if n_bytes <= room[0]:
        return {"device_map": {"": devices[0]}}
    too_large = LanguageModelError(
        f"the weights of {path.id} take {format_bytes(n_bytes)}, more than there is room for "
        f"on {', '.join(devices)} ({format_bytes(sum(room))}): give this process more GPUs "
        "(fewer processes on this machine), a smaller --model-dtype, or earlier --layers"
    )
    if n_bytes > sum(room):
        raise too_large
    numbers = [torch.device(gpu).index for gpu in devices]
    parts = infer_auto_device_map(
        empty.to(width),
        max_memory=dict(zip(numbers, room, strict=True)),
        no_split_module_classes=sorted(getattr(empty, "_no_split_modules", None) or ()),
    )
    if {"cpu", "disk"} & set(map(str, parts.values())):  # blocks are not cut
        raise too_large
    return {"device_map": parts}


def _key(mismatch: Any) -> str:
    """Return the name of a weight of another shape; transformers 4 gives it without the shapes."""
    return mismatch if isinstance(mismatch, str) else str(mismatch[0])


def attempt(path: ModelPath, load: Callable[..., Any], *, what: str = "", **settings: Any) -> Any:
    """Call a from_pretrained of transformers and turn its failures into one line."""
    talk = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it lists the layers that are not to be loaded
    try:
        return load(
            path.name,
            gguf_file=path.gguf_file,
            revision=path.revision or "main",
            local_files_only=path.offline,
            trust_remote_code=False,  # or transformers asks on the terminal
            **settings,
        )
    except Exception as error:  # whatever damaged files lead to; LORSA_DEBUG=1 shows it
        raise LanguageModelError(_one_line(path, error, what)) from error
    finally:
        transformers.logging.set_verbosity(talk)


def _one_line(path: ModelPath, error: Exception, what: str) -> str:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return (
            f"{what}model {path.id} needs code of its own, and lorsa runs no code of a model: give "
            "one that transformers knows without"
        )
    if path.offline and isinstance(error, OSError):
        return (
            f"model {path.id}: no such folder, not on this machine, and the Hub cannot be reached; "
            "give a local folder or .gguf file, or connect and try again"
        )
    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return gated(f"model {path.id}")
    if path.gguf_file is not None and find_spec("gguf") is None:
        return f"model {path.id} needs the package gguf; run: pip install gguf"
    return f"{what}model {path.id} cannot be loaded: {reason[:300]}"
