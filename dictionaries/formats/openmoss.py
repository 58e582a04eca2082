"""Checkpoints of the first Lorsa code, OpenMOSS/Lorsa: their format, and reading it.

    config.json  settings, with n_ov_heads and d_ov_head 1
    final.pth    W_Q W_K [n_qk_heads, d_model, d_qk_head], b_Q b_K [n_qk_heads, d_qk_head],
                 W_V [n_ov_heads, d_model, 1], W_O [n_ov_heads, 1, d_model], b_V [n_ov_heads, 1],
                 b_O [d_model]; buffers mask, IGNORE, rotary_sin, rotary_cos

Their conventions, where they are not ours: scores are divided by attn_scale; the weights are of
activations scaled by sqrt(d_model) / avg_norm, both x and y; use_z_relu chooses among positive z,
without it among |z|. Where fewer than top_k heads of a token are positive, theirs lets all heads
fire that tie at zero, negative ones too; ours lets the positive ones fire. Source:
OpenMOSS/Lorsa, src/models/lorsa.py and src/config.py.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..checkpoint_files import Saved, check_shapes, listing
from .foreign import (
    BUFFERS,
    Settings,
    config_of_settings,
    read_tensors,
    require_numbers,
    unscale_,
)
from .rotary_settings import take_rope

WEIGHTS = "final.pth"
HOOK = "blocks.{layer}.ln1.hook_normalized"


def is_one(content: dict[str, Any]) -> bool:
    """Return whether a config.json is theirs."""
    return "d_ov_head" in content and "n_ov_heads" in content


def read(folder: Path, content: dict[str, Any]) -> Saved:
    """Return what a folder holds, for raw activations; see `Lorsa.from_pretrained`.

    Raises:
        CheckpointError: no weights, tensors that do not fit, or a setting that we cannot express.
    """
    settings = Settings(folder / "config.json", content)
    settings.require("d_ov_head", 1, "allowed: 1, for heads of rank 1")
    settings.require("virtual_kv_num", 0, "which has no like here; allowed: 0")
    settings.drop("device", "dtype")
    n_ov_heads, d_qk_head = settings.size("n_ov_heads"), settings.size("d_qk_head")
    d_model, layer = settings.size("d_model"), settings.take("layer", int, None)
    relu = settings.take("use_z_relu", bool, False)
    top_k = settings.take("top_k", int, n_ov_heads)
    if settings.take("mode", str, "default") != "top_k":  # all heads contribute, of either sign
        relu, top_k = False, n_ov_heads
    means = settings.take("avg_norm", dict, {})
    config = config_of_settings(
        settings,
        d_model=d_model,
        n_qk_heads=settings.size("n_qk_heads"),
        d_qk_head=d_qk_head,
        n_ov_heads=n_ov_heads,
        top_k=top_k,
        select="relu" if relu else "abs",
        scale=1 / settings.above_zero("attn_scale", math.sqrt(d_qk_head)),
        rope=take_rope(settings, d_qk_head=d_qk_head, adjacent=False),
        n_ctx=settings.take("n_ctx", int, 256),
        base_model=settings.take("model_name", str, None),
        layer=layer,
        hook_in=HOOK.format(layer=0 if layer is None else layer),
    )
    settings.finish()
    tensors = _tensors(folder, config.parameter_shapes())
    if means:
        norms = [(f"avg_norm {side!r}", _number(means.get(side))) for side in ("in", "out")]
        unscale_(settings, tensors, config, norms)
    return Saved("lorsa", config, tensors)


def _tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the parameters, without the axis of the heads' width of 1."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the folder has {listing(folder)}")
    found = {name: t for name, t in read_tensors(path).items() if name not in BUFFERS}
    n_ov_heads, d_model = shapes["W_V"]
    theirs = shapes | {
        "W_V": (n_ov_heads, d_model, 1),
        "W_O": (n_ov_heads, 1, d_model),
        "b_V": (n_ov_heads, 1),
    }
    check_shapes(path, {name: tuple(tensor.shape) for name, tensor in found.items()}, theirs)
    require_numbers(path, found)
    return {name: tensor.reshape(shapes[name]).to(torch.float32) for name, tensor in found.items()}


def _number(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and abs(value) <= 2**53
    return float(value) if is_number else float("nan")
