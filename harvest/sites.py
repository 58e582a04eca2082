"""Where attention sits in a language model, and what it does there, read off the model itself.

A family of models is one `Family`: where its layers, its attention module and its rotary module
are, and how the module's weights become heads. Everything else (scale, rotary frequencies, norms,
window) is read from the module. Nothing is trusted: harvest recomputes the first batch with what
was read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..model import AttentionGeometry, LayerWeights, QKNorm, Rope
from .errors import HarvestError


class AttentionSite(NamedTuple):
    """One attention layer of a loaded model."""

    layer: int
    """Counted from 0"""
    name: str
    """Dotted name of the module in the model"""
    module: nn.Module
    """Takes x (keyword or first argument), gives y (or a tuple that starts with it)"""


class Heads(NamedTuple):
    """Sizes of the attention of a model."""

    n_heads: int
    n_kv_heads: int
    d_head: int


class Family(NamedTuple):
    """Models of one shape."""

    layers: str
    """Dotted name of the list of layers in the causal language model"""
    attention: str
    """Name of the attention module in a layer"""
    rotary: str | None
    """Dotted name of the module with `inv_freq`"""
    weights: Callable[[Any, Heads], LayerWeights]
    """Reads the module's weights as heads"""


def family_of(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        HarvestError: the model type is not in the table.
    """
    model_type = config.get_text_config().model_type
    if model_type not in FAMILIES:
        raise HarvestError(
            f"models of type {model_type} are not supported yet; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def attention_sites(model: Any, layers: list[int]) -> list[AttentionSite]:
    """Return the attention modules of some layers of a loaded model, in order.

    Raises:
        HarvestError: a layer is outside the model, or its type is not in the table.
    """
    family = family_of(model.config)
    n_layers = len(model.get_submodule(family.layers))
    if max(layers) >= n_layers:
        raise HarvestError(f"layer {max(layers)} is outside the model; it has 0-{n_layers - 1}")
    names = {layer: site_name(family, layer) for layer in layers}
    return [AttentionSite(layer, name, model.get_submodule(name)) for layer, name in names.items()]


def site_name(family: Family, layer: int) -> str:
    """Return the dotted name of a layer's attention module."""
    return f"{family.layers}.{layer}.{family.attention}"


def rotary_module(model: Any) -> Any:
    """Return the module that gives a model's cos and sin; None if it has none."""
    path = family_of(model.config).rotary
    return None if path is None else model.get_submodule(path)


def read_weights(model: Any, site: AttentionSite) -> LayerWeights:
    """Return the attention weights of a layer as heads, in the model's dtype, on its device."""
    weights = family_of(model.config).weights(site.module, _heads(model.config, site.module))
    return LayerWeights(**{name: w.detach() for name, w in weights.present().items()})


def read_geometry(model: Any, site: AttentionSite) -> AttentionGeometry:
    """Return what a layer's attention does besides its weights.

    Call it after a forward at the length that is harvested: some rotary modules fit their
    frequencies to the length.
    """
    config = model.config.get_text_config()
    module: Any = site.module
    heads = _heads(model.config, module)
    return AttentionGeometry(
        d_model=config.hidden_size,
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        d_head=heads.d_head,
        scale=float(module.scaling),
        rope=_rope(model),
        qk_norm=_qk_norm(module),
        window=_window(config, module),
    )


def _heads(config: Any, module: Any) -> Heads:
    config = config.get_text_config()
    n_heads = config.num_attention_heads
    d_head = getattr(module, "head_dim", None) or config.hidden_size // n_heads
    return Heads(n_heads, getattr(config, "num_key_value_heads", None) or n_heads, d_head)


def _rope(model: Any) -> Rope | None:
    rotary = rotary_module(model)
    if rotary is None:
        return None
    return Rope(
        inv_freq=tuple(rotary.inv_freq.float().tolist()),
        attention_scaling=float(rotary.attention_scaling),
    )


def _qk_norm(module: Any) -> QKNorm | None:
    norm = getattr(module, "q_norm", None)
    return None if norm is None else QKNorm(eps=float(norm.variance_epsilon))


def _window(config: Any, module: Any) -> int | None:
    """Return the sliding window of a layer: the module's own where it has one, else the model's."""
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def _split_heads(weight: Tensor, n_heads: int) -> Tensor:
    """Turn a Linear's weight [n_heads * d_head, d_model] to [n_heads, d_model, d_head]."""
    return weight.view(n_heads, -1, weight.shape[1]).transpose(1, 2)


def _bias(linear: Any, n_heads: int) -> Tensor | None:
    return None if linear.bias is None else linear.bias.view(n_heads, -1)


def _output_heads(linear: Any, n_heads: int) -> Tensor:
    """Turn a weight [d_model, n_heads * d_head] to [n_heads, d_head, d_model]."""
    d_model = linear.weight.shape[0]
    weight: Tensor = linear.weight.T.view(n_heads, -1, d_model)
    return weight


def _separate_projections(module: Any, heads: Heads) -> LayerWeights:
    """Read q_proj, k_proj, v_proj, o_proj and, where there are, q_norm and k_norm."""
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if norm is None else norm.weight for norm in norms)
    return LayerWeights(
        W_Q=_split_heads(module.q_proj.weight, heads.n_heads),
        W_K=_split_heads(module.k_proj.weight, heads.n_kv_heads),
        W_V=_split_heads(module.v_proj.weight, heads.n_kv_heads),
        W_O=_output_heads(module.o_proj, heads.n_heads),
        b_Q=_bias(module.q_proj, heads.n_heads),
        b_K=_bias(module.k_proj, heads.n_kv_heads),
        b_V=_bias(module.v_proj, heads.n_kv_heads),
        b_O=module.o_proj.bias,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def _fused_by_head(module: Any, heads: Heads) -> LayerWeights:
    """Read query_key_value, in which each head has its q, k and v rows together, and dense."""
    qkv, n_heads = module.query_key_value, heads.n_heads
    W = qkv.weight.view(n_heads, 3, heads.d_head, -1).transpose(
        2, 3
    )  # [head, qkv, d_model, d_head]
    b = None if qkv.bias is None else qkv.bias.view(n_heads, 3, heads.d_head)
    b_Q, b_K, b_V = (None, None, None) if b is None else b.unbind(1)
    W_Q, W_K, W_V = W.unbind(1)
    return LayerWeights(
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        W_O=_output_heads(module.dense, n_heads),
        b_Q=b_Q,
        b_K=b_K,
        b_V=b_V,
        b_O=module.dense.bias,
    )


_LLAMA = Family("model.layers", "self_attn", "model.rotary_emb", _separate_projections)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": Family("gpt_neox.layers", "attention", "gpt_neox.rotary_emb", _fused_by_head),
}


def attention_names(config: Any) -> dict[int, str]:
    """Return every layer of a model with the name of its attention module."""
    family = family_of(config)
    n_layers = config.get_text_config().num_hidden_layers
    return {layer: site_name(family, layer) for layer in range(n_layers)}
