"""Checkpoints of Llamascopium, written; their format and conventions are in llamascopium.py."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...language.geometry import RARE
from ..checkpoint_files import Saved, write_folder
from ..lorsa.config import LorsaConfig
from .foreign import Settings
from .llamascopium import OURS, PARTS, QK_NORMS, THRESHOLD, WEIGHTED_INPUT, WEIGHTS
from .rotary_settings import spell_rope, take_rope

MOST_CTX = 8192
"""Longest sequence that is written as theirs: their files hold a mask of its square."""


def write(saved: Saved, folder: Path, hook_in: str | None = None) -> None:
    """Write a Lorsa into a folder as Llamascopium reads it, on raw activations.

    Args:
        saved: the Lorsa, for raw activations.
        folder: is made if need be.
        hook_in: name of the hook that gives its x; None is its own or, of our x, one that they do
            not have.

    Raises:
        CheckpointError: a setting has no like in theirs, or the disk does not take it.
    """
    c, found = saved.config, saved.tensors
    if not isinstance(c, LorsaConfig):
        raise CheckpointError(f"{c.title} cannot be written for Llamascopium; only Lorsas can")
    settings = _settings(c, folder)
    layer = 0 if c.layer is None else c.layer
    settings["hook_point_in"] = hook_in or c.hook_in or f"blocks.{layer}.{WEIGHTED_INPUT}"
    settings["hook_point_out"] = f"blocks.{layer}.hook_attn_out"
    entry = c.to_dict()
    tensors: dict[str, Tensor] = {name: found[name] for name in PARTS}
    tensors["b_D"] = found["b_O"]
    for theirs, ours in QK_NORMS.items():
        if ours in found:
            tensors[theirs] = found[ours].expand(c.n_qk_heads, c.d_qk_head)
    if "threshold" in found:
        entry["threshold"] = float(found["threshold"])
    if "log_threshold" in found:  # in float64, so that it comes back to the bit
        level = math.log(entry["threshold"])
        tensors[THRESHOLD] = found["log_threshold"].detach().double() + level
    tensors |= _buffers(settings)
    write_folder(folder, WEIGHTS, tensors, {**settings, OURS: entry}, {"version": "2.0.0b34"})


def _settings(c: LorsaConfig, folder: Path) -> dict[str, Any]:
    """Return their settings but for the hooks; CheckpointError if one cannot be expressed."""
    for name in ("select", "softcap", "window", *RARE):
        value = getattr(c, name)
        if value not in ("relu", None, False):
            raise CheckpointError(
                f"{folder}: Llamascopium has no {name} (here {value!r}); it cannot be expressed"
            )
    settings: dict[str, Any] = {
        "sae_type": "lorsa",
        "d_model": c.d_model,
        "expansion_factor": _factor(c.n_ov_heads, c.d_model),
        "use_decoder_bias": True,
        "act_fn": c.activation,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": c.score_by_norm,
        "top_k": c.top_k,
        "n_qk_heads": c.n_qk_heads,
        "d_qk_head": c.d_qk_head,
        "n_ctx": min(c.n_ctx or 2048, MOST_CTX),
        "attn_scale": 1 / c.scale,
        "positional_embedding_type": "none",
        "rotary_dim": c.d_qk_head,
        "use_post_qk_ln": c.qk_norm is not None,
    }
    if c.qk_norm is not None:
        if c.qk_norm.kind not in ("rms", "rms_by_head"):
            raise CheckpointError(
                f"{folder}: Llamascopium has no qk_norm of kind {c.qk_norm.kind!r}; "
                "it cannot be expressed"
            )
        settings |= {"normalization_type": "RMS", "eps": c.qk_norm.eps}
    if c.rope is not None:
        rope = spell_rope(c.rope)
        partial = 2 * len(c.rope.inv_freq) < c.d_qk_head
        if rope is None or (partial and c.rope.attention_scaling != 1):
            raise CheckpointError(
                f"{folder}: the rope has no rotary_base and NTK_by_parts settings that give its "
                "frequencies; it cannot be expressed"
            )
        settings |= rope
        settings["attn_scale"] /= c.rope.attention_scaling**2  # q and k carry it once each
    return settings


def _factor(n_ov_heads: int, d_model: int) -> float:
    """Return an expansion factor that gives back the number of heads when cut to a whole number."""
    factor = n_ov_heads / d_model
    return factor if int(d_model * factor) == n_ov_heads else math.nextafter(factor, math.inf)


def _buffers(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Return the buffers that their strict loading asks for."""
    n_ctx = settings["n_ctx"]
    buffers = {
        "mask": torch.ones(n_ctx, n_ctx, dtype=torch.bool).tril(),
        "IGNORE": torch.tensor(-torch.inf),
    }
    if settings["positional_embedding_type"] == "none":
        return buffers
    taken = take_rope(Settings(Path(), settings), d_qk_head=settings["d_qk_head"], adjacent=True)
    assert taken is not None
    angles = torch.arange(n_ctx)[:, None] * torch.tensor(taken.inv_freq)
    if taken.interleaved:
        angles = angles.repeat_interleave(2, dim=1)
    else:
        angles = torch.cat([angles, angles], dim=1)
    return {**buffers, "rotary_sin": angles.sin(), "rotary_cos": angles.cos()}
