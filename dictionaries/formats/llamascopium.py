"""Checkpoints of Llamascopium (Language-Model-SAEs before): their format, and reading it.

    config.json              settings, sae_type "lorsa"
    sae_weights.safetensors  W_Q W_K [n_qk_heads, d_model, d_qk_head], b_Q b_K [n_qk_heads,
                             d_qk_head], W_V W_O [n_ov_heads, d_model], b_V [n_ov_heads],
                             b_D [d_model] (our b_O); ln_q.w ln_k.w [n_qk_heads, d_qk_head] with a
                             qk-norm; activation_function.log_jumprelu_threshold [n_ov_heads] with
                             jumprelu; dataset_average_activation_norm.HOOK []; buffers mask,
                             IGNORE, rotary_sin, rotary_cos, which follow from the settings

Their conventions, where they are not ours: scores are divided by attn_scale; with norm_activation
"dataset-wise" the weights are of activations scaled to a mean norm of sqrt(d_model), both x and y;
top_k of "batchtopk" is a mean over all tokens that are given at once, and no threshold is kept;
each head has a factor of its own in the qk-norm; x is by its hook's name the layer's input before
the norm's weight (`LorsaConfig.hook_in`). Source: Llamascopium 2.0.0b34, models/lorsa.py.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...language.geometry import QKNorm, read_rope
from ..checkpoint_files import Saved, check_shapes, listing
from ..lorsa.config import LorsaConfig
from .foreign import (
    BUFFERS,
    LARGEST,
    Settings,
    config_of_settings,
    read_tensors,
    require_numbers,
    unscale_,
)
from .rotary_settings import same, take_rope

WEIGHTS = "sae_weights.safetensors"
OTHER_WEIGHTS = (
    "sae_weights.pt",
    "checkpoints/pruned.safetensors",
    "checkpoints/pruned.pt",
    "checkpoints/final.safetensors",
    "checkpoints/final.pt",
)
"""Names of the weights where there is no `WEIGHTS`; the first that is there is read."""
WEIGHTED_INPUT = "attn_input_weighted"
"""Stands for a hook of theirs at our x, of which they have none where a norm has a weight."""
PARTS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
QK_NORMS = {"ln_q.w": "q_norm", "ln_k.w": "k_norm"}
THRESHOLD = "activation_function.log_jumprelu_threshold"
MEAN_NORM = "dataset_average_activation_norm."
OURS = "lorsa"
"""Key of config.json for what their settings cannot say; they pass over it."""
UNUSED = (
    "use_triton_kernel",
    "sparsity_threshold_for_triton_spmm_kernel",
    "jumprelu_threshold_window",
    "sae_pretrained_name_or_path",
    "model_name",
    "skip_bos",
    "device",
    "dtype",
)
"""Settings of theirs that do not change what a Lorsa computes."""


def is_one(content: dict[str, Any]) -> bool:
    """Return whether a config.json is theirs."""
    return content.get("sae_type") == "lorsa"


def read(folder: Path, content: dict[str, Any]) -> Saved:
    """Return what a folder holds, for raw activations; see `Lorsa.from_pretrained`.

    Raises:
        CheckpointError: no weights, tensors that do not fit, or a setting that we cannot express.
    """
    settings = Settings(folder / "config.json", content)
    path = _weights(folder)
    tensors = read_tensors(path)
    entry = settings.take(OURS, dict, {})
    hooks = [settings.take(name, str) for name in ("hook_point_in", "hook_point_out")]
    scaled = _scaled(settings)
    with_bias = settings.take("use_decoder_bias", bool, True)
    config = _config(settings, tensors, entry, hooks)
    norms = [(MEAN_NORM + hook, _number(tensors.get(MEAN_NORM + hook))) for hook in hooks]
    found = _checked(config, path, tensors, with_bias=with_bias)
    threshold = _threshold(settings, config, entry)
    ours = _filled(config, found, threshold)
    if scaled:
        unscale_(settings, ours, config, norms)
    return Saved("lorsa", config, ours)


def _weights(folder: Path) -> Path:
    for name in (WEIGHTS, *OTHER_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    if any(folder.rglob("*.dcp")):
        raise CheckpointError(
            f"{folder} holds a distributed checkpoint (.dcp); let Llamascopium save {WEIGHTS}"
        )
    raise CheckpointError(f"{folder / WEIGHTS} is missing; the folder has {listing(folder)}")


def _scaled(settings: Settings) -> bool:
    """Return whether the weights are of scaled activations."""
    norm = settings.take("norm_activation", str, "dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        why = "which scales y by its own norm; allowed: dataset-wise, inference"
        raise settings.refuse("norm_activation", norm, why)
    return bool(norm == "dataset-wise")


def _config(
    settings: Settings, tensors: dict[str, Tensor], entry: dict[str, Any], hooks: list[str]
) -> LorsaConfig:
    settings.drop("sae_type", *UNUSED)
    d_model, factor = settings.size("d_model"), settings.above_zero("expansion_factor")
    if d_model * factor > LARGEST:
        raise settings.refuse("expansion_factor", factor, f"allowed: {LARGEST} heads at most")
    n_ov_heads, d_qk_head = int(d_model * factor), settings.size("d_qk_head")
    config = config_of_settings(
        settings,
        d_model=d_model,
        n_qk_heads=settings.size("n_qk_heads"),
        d_qk_head=d_qk_head,
        n_ov_heads=n_ov_heads,
        scale=1 / settings.above_zero("attn_scale", math.sqrt(d_qk_head)),
        score_by_norm=settings.take("sparsity_include_decoder_norm", bool, True),
        rope=take_rope(settings, d_qk_head=d_qk_head, adjacent=True),
        qk_norm=_qk_norm(settings, tensors),
        n_ctx=settings.size("n_ctx"),
        layer=_layer(*hooks),
        hook_in=None if hooks[0].endswith(WEIGHTED_INPUT) else hooks[0],
        **_activation(settings, n_ov_heads),
    )
    settings.finish()
    return _with_entry(settings, config, entry)


def _layer(hook_in: str, hook_out: str) -> int | None:
    """Return the layer whose attention's output is approximated from its input; None if none is."""
    layer = re.match(r"blocks\.([0-9]{1,6})\.", hook_in)
    is_attention = layer is not None and hook_out == f"blocks.{layer[1]}.hook_attn_out"
    return int(layer[1]) if layer is not None and is_attention else None


def _activation(settings: Settings, n_ov_heads: int) -> dict[str, Any]:
    """Return the rule by which heads fire. Their rules have no max_l0: all heads may fire."""
    rule = settings.take("act_fn", str, "relu").lower()
    top_k = min(settings.take("top_k", int, 50), n_ov_heads)
    if rule == "topk":
        return {"top_k": top_k}
    if rule == "relu":  # all that are positive
        return {"top_k": n_ov_heads}
    if rule == "batchtopk":
        return {"top_k": top_k, "activation": rule, "max_l0": n_ov_heads, "has_threshold": False}
    if rule == "jumprelu":
        return {"top_k": top_k, "activation": rule, "max_l0": n_ov_heads}
    raise settings.refuse("act_fn", rule, "allowed: topk, batchtopk, jumprelu, relu")


def _qk_norm(settings: Settings, tensors: dict[str, Tensor]) -> QKNorm | None:
    eps = settings.take("eps", (float, int), 1e-6)
    kind = settings.take("normalization_type", str, None)
    if not settings.take("use_post_qk_ln", bool, False):
        return None
    if kind != "RMS":
        raise settings.refuse("normalization_type", kind, "allowed with use_post_qk_ln: RMS")
    if eps < 0:
        raise settings.refuse("eps", eps, "allowed: 0 or more")
    kept = [tensors[name] for name in QK_NORMS if name in tensors and tensors[name].ndim]
    alike = all(bool((weight == weight[:1]).all()) for weight in kept)
    return QKNorm(eps=float(eps), kind="rms" if alike else "rms_by_head")


def _with_entry(settings: Settings, config: LorsaConfig, entry: dict[str, Any]) -> LorsaConfig:
    """Return a config with what only our own entry says; their settings win wherever they speak."""
    if not entry:
        return config
    names = ("n_ctx", "max_l0", "has_threshold", "base_model", "base_revision", "layer")
    kept = {name: entry[name] for name in (*names, "store_uuid") if name in entry}
    if config.activation == "topk":
        kept.pop("max_l0", None)
    if config.activation != "batchtopk":
        kept.pop("has_threshold", None)
    try:
        rope = read_rope(entry.get("rope"))
        if rope is not None and config.rope is not None:
            mine, theirs = (torch.tensor(r.inv_freq).double() for r in (rope, config.rope))
            if rope.interleaved == config.rope.interleaved and same(mine, theirs):
                kept["rope"] = replace(rope, attention_scaling=1.0)
        return replace(config, **kept)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{settings.path}: its entry {OURS!r} is wrong: {error}") from None


def _threshold(settings: Settings, c: LorsaConfig, entry: dict[str, Any]) -> float:
    """Return what our entry says of the threshold, 1 where it need not say anything."""
    needed = c.activation == "batchtopk" and c.has_threshold
    if c.activation == "topk" or not (needed or "threshold" in entry):
        return 1.0
    value: Any = entry.get("threshold")
    is_number = isinstance(value, (float, int)) and not isinstance(value, bool)
    if not is_number or not (value > 0 or (value == 0 and c.activation == "batchtopk")):
        raise settings.refuse(f"threshold of its entry {OURS!r}", value, "allowed: above 0")
    return float(value)


def _checked(
    c: LorsaConfig, path: Path, tensors: dict[str, Tensor], *, with_bias: bool
) -> dict[str, Tensor]:
    """Return their tensors, after checking that they are those that a Lorsa needs."""
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in BUFFERS and not name.startswith(MEAN_NORM)
    }
    _repeat(found, c.n_qk_heads)
    ours = c.parameter_shapes()
    shapes = {name: ours[name] for name in PARTS}
    if with_bias:
        shapes["b_D"] = ours["b_O"]
    if c.qk_norm is not None:
        shapes |= dict.fromkeys(QK_NORMS, (c.n_qk_heads, c.d_qk_head))
    if c.activation == "jumprelu":
        shapes[THRESHOLD] = (c.n_ov_heads,)
    check_shapes(path, {name: tuple(tensor.shape) for name, tensor in found.items()}, shapes)
    require_numbers(path, found)
    return found


def _filled(c: LorsaConfig, found: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Return their tensors under our names, in float32."""
    ours = {name: found[name] for name in PARTS}
    ours["b_O"] = found.get("b_D", torch.zeros(c.d_model))
    if c.qk_norm is not None:
        by_head = c.qk_norm.by_head
        ours |= {ours_: found[n] if by_head else found[n][0] for n, ours_ in QK_NORMS.items()}
    if c.activation != "topk":
        ours["threshold"] = torch.tensor(threshold)
        if c.activation == "jumprelu":
            ours["log_threshold"] = found[THRESHOLD].double() - math.log(threshold)
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in ours.items()}


def _repeat(tensors: dict[str, Tensor], n_qk_heads: int) -> None:
    """Repeat the QK heads of a file that has fewer than its config, as they do."""
    for name in ("W_Q", "W_K", "b_Q", "b_K", *QK_NORMS):
        tensor = tensors.get(name)
        n_heads = len(tensor) if tensor is not None and tensor.ndim else 0
        if tensor is not None and 0 < n_heads < n_qk_heads and n_qk_heads % n_heads == 0:
            tensors[name] = tensor.repeat_interleave(n_qk_heads // n_heads, dim=0)


def _number(norm: Tensor | None) -> float:
    if norm is None or norm.numel() != 1 or norm.is_complex():
        return float("nan")
    return float(norm)
