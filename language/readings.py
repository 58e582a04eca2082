"""Readings of an attention module: what it computes, by its attributes and its model's.

Names say most of it: projections, norms, scale, heads, window, softcap. Where they leave a choice
(how a fused projection is cut, which channels a rotation pairs) every reading is offered, the
likeliest first, and the self-check takes the first that gives the module's output.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .attention import LayerWeights, Reading
from .blocks import AttentionSite, float32_copy
from .capture import Call
from .geometry import Alibi, AttentionGeometry, QKNorm, Stretch
from .rotary import ropes_of

FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
SEPARATE = ("q_proj", "k_proj", "v_proj")
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
QK_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("qk_norm", "qk_norm"))
BIASES = ("alibi", "position_bias")
SCALES = ("scaling", "softmax_scale", "inv_norm_factor")


Cut = Callable[[Tensor, "Heads"], list[Tensor]]


class Unreadable(Exception):  # noqa: N818 - it stays within the folder
    """The attributes of a module do not say what it computes; the message says what is lacking."""


class Heads(NamedTuple):
    """Sizes of the attention of a layer."""

    n_heads: int
    n_kv_heads: int
    d_head: int


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
        yield Reading(
            AttentionGeometry(
                d_model=config.hidden_size,
                n_heads=len(weights.W_Q),
                n_kv_heads=len(weights.W_K),
                d_head=heads.d_head,
                scale=scale,
                rope=rope,
                qk_norm=_qk_norm(module, len(weights.W_Q)),
                softcap=getattr(module, "attn_logit_softcapping", None),
                window=window,
                clip=clip,
                chunk=chunk,
                stretch=stretch,
                alibi=alibi,
            ),
            weights,
        )


def heads_of(model: Any, site: AttentionSite) -> Heads:
    """Return what a module, or its model's config, says of its heads."""
    config, module = model.config.get_text_config(), site.module

    def said(*names: str) -> int | None:
        holders = (module, config)
        return next((v for h in holders for n in names if (v := getattr(h, n, None))), None)

    n_heads = said("num_attention_heads", "num_heads", "n_heads") or 1
    n_kv_heads = said("num_key_value_heads", "num_kv_heads", "kv_heads") or n_heads
    return Heads(n_heads, n_kv_heads, said("head_dim") or config.hidden_size // n_heads)


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


def weight_readings(model: Any, site: AttentionSite) -> list[LayerWeights]:
    """Return the layer's weights as heads, cut in every way that they may be meant.

    Raises:
        Unreadable: projections or norms that are not known.
    """
    module, heads = site.module, heads_of(model, site)
    output = _child(module, OUTPUT)
    if all(hasattr(module, name) for name in SEPARATE):
        projections = [getattr(module, name) for name in SEPARATE]
        rows, biases = [weight_rows(p) for p in projections], [p.bias for p in projections]
        return [_as_heads(module, output, rows, biases, heads.d_head)]
    fused = _child(module, FUSED)
    cuts: list[Cut] = [_cut_in_blocks, _cut_by_group]
    if hasattr(module, "query_key_value"):
        cuts.reverse()
    return [
        _as_heads(
            module,
            output,
            cut(weight_rows(fused), heads),
            [None] * 3 if fused.bias is None else [*cut(fused.bias, heads)],
            heads.d_head,
        )
        for cut in cuts
    ]


def _child(module: Any, names: tuple[str, ...]) -> Any:
    """Return the first of some children that a module has."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise Unreadable(f"{type(module).__name__} has none of {', '.join(names)}")


def weight_rows(projection: Any) -> Tensor:
    """Return a projection's weight, [n_out, n_in]."""
    weight = projection.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise Unreadable(f"{type(projection).__name__} is quantised")
    return weight.T if isinstance(projection, Conv1D) else weight


def _cut_in_blocks(fused: Tensor, heads: Heads) -> list[Tensor]:
    """Cut rows that come as all queries, all keys, all values."""
    q, kv = heads.n_heads * heads.d_head, heads.n_kv_heads * heads.d_head
    _require_rows(fused, q + 2 * kv)
    return list(fused.split([q, kv, kv]))


def _cut_by_group(fused: Tensor, heads: Heads) -> list[Tensor]:
    """Cut rows that come, for each key head, as its queries, its key, its value."""
    share = heads.n_heads // heads.n_kv_heads
    _require_rows(fused, (share + 2) * heads.n_kv_heads * heads.d_head)
    groups = fused.unflatten(0, (heads.n_kv_heads, share + 2, heads.d_head))
    return [part.flatten(0, 2) for part in groups.split([share, 1, 1], dim=1)]


def _require_rows(weight: Tensor, n_rows: int) -> None:
    if len(weight) != n_rows:
        raise Unreadable(f"a fused projection has {len(weight)} rows; its heads have {n_rows}")


def _as_heads(
    module: Any, output: Any, rows: list[Tensor], biases: list[Tensor | None], d_head: int
) -> LayerWeights:
    """Return weights by head of the rows of q, k and v, [n_heads * d_head, d_model] each."""
    out = weight_rows(output)  # [d_model, n_heads * d_head]
    n_q = len(rows[0])
    if out.shape[1] != n_q or len(rows[1]) != len(rows[2]) or n_q % len(rows[1]) or n_q % d_head:
        raise Unreadable(
            f"{type(module).__name__} has projections of {[len(r) for r in rows]} rows to heads "
            f"of {d_head}, and an output of {out.shape[1]}"
        )
    W_Q, W_K, W_V = (r.unflatten(0, (-1, d_head)).transpose(1, 2) for r in rows)
    b_Q, b_K, b_V = (None if b is None else b.view(-1, d_head) for b in biases)
    weights = LayerWeights(
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        W_O=out.T.unflatten(0, (-1, d_head)),
        b_Q=b_Q,
        b_K=b_K,
        b_V=b_V,
        b_O=output.bias,
        **_norm_weights(module, {"q": len(W_Q), "k": len(W_K)}, d_head),
    )
    return LayerWeights(**{name: w.detach() for name, w in weights.present().items()})


def _norms(module: Any) -> dict[str, list[Any]]:
    """Return the norms of queries and keys, by "q" and "k", one for all heads or one for each.

    Nothing if there are none.
    """
    for names in QK_NORMS:
        norms = [getattr(module, name, None) for name in names]
        if all(norm is not None for norm in norms):  # StableLM has one for each head
            return dict(zip("qk", (list(getattr(n, "norms", [n])) for n in norms), strict=True))
    return {}


def _qk_norm(module: Any, n_heads: int) -> QKNorm | None:
    """Return the kind of norm that a module with so many query heads has."""
    norms = _norms(module)
    if not norms:
        return None
    one = norms["q"][0]
    eps = getattr(one, "variance_epsilon", None) or getattr(one, "eps", None)
    kind = type(one).__name__
    if eps is None or not any(name in kind for name in ("RMS", "L2Norm", "LayerNorm")):
        raise Unreadable(f"its qk-norm is a {kind}")
    if not ("RMS" in kind or "L2Norm" in kind):
        return QKNorm(eps=float(eps), kind="layer")
    full = hasattr(one, "weight") and len(one.weight) == n_heads * module.head_dim
    return QKNorm(eps=float(eps), kind="rms_full" if full and n_heads > 1 else "rms")


def _norm_weights(module: Any, n_heads: dict[str, int], d_head: int) -> dict[str, Tensor]:
    """Return q_norm and k_norm and, where they have some, their biases."""
    kind = _qk_norm(module, n_heads["q"])
    found = {}
    for side, parts in _norms(module).items():
        factors = [_factor(part, _child(module, OUTPUT).weight.new_ones(d_head)) for part in parts]
        biases = [b for part in parts if (b := getattr(part, "bias", None)) is not None]
        for name, tensors in ((f"{side}_norm", factors), (f"{side}_norm_bias", biases)):
            if tensors:
                flat = torch.stack(tensors).view(-1, d_head)  # [n_heads or 1, d_head]
                by_head = kind is not None and kind.by_head
                found[name] = flat.expand(n_heads[side], -1).clone() if by_head else flat[0]
    return found


def _factor(norm: Any, ones: Tensor) -> Tensor:
    """Return what a norm multiplies by: its weight, 1 + weight in float32 (Gemma), or ones."""
    if getattr(norm, "weight", None) is None:
        return ones
    weight: Tensor = norm.weight
    if "RMS" not in type(norm).__name__:
        return weight
    with torch.no_grad():
        ones = torch.ones(weight.shape, device=weight.device)
        found = float32_copy(norm)(ones)
        plus = 1 + weight.float()
        return plus if (found - plus).norm() < (found - weight).norm() else weight
