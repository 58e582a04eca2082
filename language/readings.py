"""Readings of an attention module: what it computes, by its attributes and its model's.

Names say most of it: projections, norms, scale, heads, window, softcap. Where they leave a choice
(how a fused projection is cut, which channels a rotation pairs) every reading is offered, the
likeliest first, and the self-check takes the first that gives the module's output.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from .attention import Reading
from .blocks import AttentionSite
from .capture import Call
from .geometry import GATES, Alibi, AttentionGeometry, Stretch
from .projections import Heads, heads_of, latent_eps, qk_norm_of, weight_readings
from .rotary import ropes_of

BIASES = ("alibi", "position_bias")
SCALES = ("scaling", "softmax_scale", "inv_norm_factor")


def readings(model: Any, site: AttentionSite, call: Call) -> Iterator[Reading]:
    """Yield every way in which a layer may be understood, the likeliest first.

    Call it after a forward at the length that is harvested: some rotary modules fit their
    frequencies to the length. Weights are in the model's dtype, on its device.

    Args:
        model, site: language model and the layer in it.
        call: how the layer was run; biases of the scores are among its arguments.

    Raises:
        Unreadable: the module does not say enough.
    """
    config, module = model.config.get_text_config(), site.module
    heads, ropes = heads_of(model, site), ropes_of(model, site)
    windows, clips = _windows(config, module, site.layer), _clips(config, module)
    stretches, chunk = _stretches(config, module), _chunk(config, site.layer)
    alibis, scales = _alibis(call, heads.n_heads), _scales(module, heads)
    choices = product(clips, ropes, scales, windows, stretches, alibis)
    for weights, choice in product(weight_readings(model, site), choices):
        clip, rope, scale, window, stretch, alibi = choice
        plain = Reading(
            AttentionGeometry(
                d_model=config.hidden_size,
                n_heads=len(weights.W_Q),
                n_kv_heads=len(weights.W_K),
                d_head=heads.d_head,
                scale=scale,
                rope=rope,
                qk_norm=qk_norm_of(module, len(weights.W_Q)),
                softcap=getattr(module, "attn_logit_softcapping", None),
                window=window,
                clip=clip,
                chunk=chunk,
                stretch=stretch,
                alibi=alibi,
                sinks=weights.sinks is not None,
                latent=latent_eps(module),
            ),
            weights,
        )
        for gate in (None,) if weights.W_G is None else GATES:
            yield plain._replace(geometry=replace(plain.geometry, gate=gate))


def _scales(module: Any, heads: Heads) -> list[float]:
    """Return what the scores may be multiplied by."""
    usual = float(heads.d_head) ** -0.5
    for name in SCALES:
        if isinstance(said := getattr(module, name, None), float):
            return [said]
    by_layer = getattr(module, "scale_attn_by_inverse_layer_idx", False)  # GPT-2, transformers 4
    return [usual, 1.0, *([usual / (module.layer_idx + 1)] if by_layer else [])]


def _windows(config: Any, module: Any, layer: int) -> list[int | None]:
    """Return the sliding windows that a layer may have: the module's own or the model's."""
    if hasattr(config, "attention_layers"):  # GPT-Neo
        return [config.window_size if config.attention_layers[layer] == "local" else None]
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None)) or None
    kind = _layer_type(config, layer)
    choices = [None, window] if kind not in (None, "sliding_attention") else [window, None]
    return list(dict.fromkeys(choices))


def _layer_type(config: Any, layer: int) -> str | None:
    """Return what the config calls a layer's attention, where it does."""
    types = getattr(config, "layer_types", None)
    return types[layer] if types else None


def _chunk(config: Any, layer: int) -> int | None:
    """Return the size of the chunks in which a layer attends, if it does."""
    chunked = _layer_type(config, layer) == "chunked_attention"
    return config.attention_chunk_size if chunked else None


def _stretches(config: Any, module: Any) -> list[Stretch | None]:
    """Return how a layer's queries may grow with their position."""
    if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:  # Llama 4
        return [Stretch(gain=module.attn_scale, every=module.floor_scale, first=1)]
    said = getattr(config, "rope_parameters", None) or {}
    if isinstance(gain := said.get("llama_4_scaling_beta"), float):
        return [Stretch(gain=gain, every=said["original_max_position_embeddings"]), None]
    return [None]


def _clips(config: Any, module: Any) -> list[float | None]:
    """Return what queries, keys and values may be limited to: the module's own or the model's."""
    for holder in (module, config, getattr(config, "attn_config", None)):
        if isinstance(said := getattr(holder, "clip_qkv", None), float | int) and said:
            return [float(said), None]
    return [None]


def _alibis(call: Call, n_heads: int) -> list[Alibi | None]:
    """Return the linear biases that a layer may add to its scores, as it was given them."""
    given = next((b for name in BIASES if (b := call.kwargs.get(name)) is not None), None)
    if given is None:
        return [None]
    bias = given.double().reshape(-1, n_heads, given.shape[-1])[0]  # [n_heads, keys]
    half = None if given.dtype == torch.float32 else str(given.dtype).removeprefix("torch.")
    first, mean = bias[:, 1] - bias[:, 0], (bias[:, -1] - bias[:, 0]) / (bias.shape[1] - 1)
    return [
        Alibi(slopes=tuple(slopes.tolist()), scaled=scaled, rounded=rounded, cast=cast)
        for slopes, rounded in ((mean, False), (first, True))
        for scaled, cast in dict.fromkeys([(False, None), (True, half), (True, None)])
    ]
