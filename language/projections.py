"""Weights of an attention module by head, however its projections are laid out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .attention import LayerWeights
from .blocks import AttentionSite, float32_copy
from .geometry import QKNorm

FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
SEPARATE = ("q_proj", "k_proj", "v_proj")
GATE = ("gate_proj", "g_proj")
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
QK_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("qk_norm", "qk_norm"))


Cut = Callable[[Tensor, "Heads"], list[Tensor]]


class Unreadable(Exception):  # noqa: N818 - it stays within the folder
    """The attributes of a module do not say what it computes; the message says what is lacking."""


class Heads(NamedTuple):
    """Sizes of the attention of a layer."""

    n_heads: int
    n_kv_heads: int
    d_head: int


def heads_of(model: Any, site: AttentionSite) -> Heads:
    """Return what a module, or its model's config, says of its heads."""
    config, module = model.config.get_text_config(), site.module

    def said(*names: str) -> int | None:
        holders = (module, config)
        return next((v for h in holders for n in names if (v := getattr(h, n, None))), None)

    n_heads = said("num_attention_heads", "num_heads", "n_heads") or 1
    n_kv_heads = said("num_key_value_heads", "num_kv_heads", "kv_heads") or n_heads
    return Heads(
        n_heads, n_kv_heads, said("qk_head_dim", "head_dim") or config.hidden_size // n_heads
    )


def weight_readings(model: Any, site: AttentionSite) -> list[LayerWeights]:
    """Return the layer's weights as heads, cut in every way that they may be meant.

    Raises:
        Unreadable: projections or norms that are not known.
    """
    module, heads = site.module, heads_of(model, site)
    output = _child(module, OUTPUT)
    if getattr(module, "kv_b_proj", None) is not None:
        return [_latent_weights(module, output, heads)]
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
    """Return weights by head of the rows of q, k and v, [heads * width, d_model] each."""
    out = weight_rows(output)  # [d_model, n_heads * width of values]
    n_out, (n_q, n_k, n_v) = out.shape[1], map(len, rows)
    gate, gate_bias = _gate(module)
    if gate is None and n_q == 2 * n_out and n_k == n_v:  # of each head first q, then the gate
        (rows[0], gate), (biases[0], gate_bias) = (_halves(t, d_head) for t in (rows[0], biases[0]))
        n_q = n_out
    n_heads = n_q // d_head
    if n_q % d_head or n_q % n_k or n_k * n_out != n_v * n_q or n_out % n_heads:
        raise Unreadable(
            f"{type(module).__name__} has projections of {[len(r) for r in rows]} rows to heads "
            f"of {d_head}, and an output of {n_out}"
        )
    counts = (n_heads, n_k // d_head, n_k // d_head)
    W_Q, W_K, W_V = (r.unflatten(0, (n, -1)).mT for r, n in zip(rows, counts, strict=True))
    b_Q, b_K, b_V = (
        None if b is None else b.view(n, -1) for b, n in zip(biases, counts, strict=True)
    )
    if isinstance(scale := getattr(module, "v_scale", None), float):  # MiMo
        W_V, b_V = scale * W_V, None if b_V is None else scale * b_V
    weights = LayerWeights(
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        W_O=out.T.unflatten(0, (n_heads, -1)),
        b_Q=b_Q,
        b_K=b_K,
        b_V=b_V,
        b_O=output.bias,
        sinks=getattr(module, "sinks", None),
        W_G=None if gate is None else gate.unflatten(0, (n_heads, -1)).transpose(1, 2),
        b_G=None if gate_bias is None else gate_bias.unflatten(0, (n_heads, -1)),
        **_norm_weights(module, {"q": len(W_Q), "k": len(W_K)}, d_head),
    )
    return LayerWeights(**{name: w.detach() for name, w in weights.present().items()})


def latent_eps(module: Any) -> float | None:
    """Return the eps of the norms of a module's latents; None where it has none."""
    norms = [getattr(module, name, None) for name in ("q_a_layernorm", "kv_a_layernorm")]
    found = {norm.variance_epsilon for norm in norms if norm is not None}
    if len(found) > 1:
        raise Unreadable("the norms of its latents differ in eps")
    return found.pop() if found else None


def _latent_weights(module: Any, output: Any, heads: Heads) -> LayerWeights:
    """Return the weights of multi-head latent attention.

    Keys rotate in channels of their own, one vector for all heads. They come first in every head,
    as `rotate` has them.
    """
    rank, n_heads, d_head = module.kv_lora_rank, heads.n_heads, heads.d_head
    down, up = weight_rows(module.kv_a_proj_with_mqa), weight_rows(module.kv_b_proj)
    turning = len(down) - rank
    up = up.unflatten(0, (n_heads, -1)).transpose(1, 2)  # [n_heads, rank, d_head - turning + d_v]
    own, values = up.tensor_split([d_head - turning], dim=2)
    shared = up.new_zeros(n_heads, rank + turning, turning)
    shared[:, rank:] = torch.eye(turning).to(up)
    pad = (0, 0, 0, turning)
    low = getattr(module, "q_a_proj", None)
    queries = module.q_proj if low is None else module.q_b_proj
    W_Q = weight_rows(queries).unflatten(0, (n_heads, d_head)).transpose(1, 2)
    weights = LayerWeights(
        W_Q=W_Q.roll(turning, dims=2),
        W_K=torch.cat([shared, F.pad(own, pad)], dim=2),
        W_V=F.pad(values, pad),
        W_O=weight_rows(output).T.unflatten(0, (n_heads, -1)),
        b_O=output.bias,
        W_DQ=None if low is None else weight_rows(low).T,
        b_DQ=None if low is None else low.bias,
        q_latent=None if low is None else module.q_a_layernorm.weight,
        W_DKV=down.T,
        b_DKV=module.kv_a_proj_with_mqa.bias,
        kv_latent=module.kv_a_layernorm.weight,
    )
    return LayerWeights(**{name: w.detach() for name, w in weights.present().items()})


def _gate(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of the gate's own projection, [n_heads * width, d_model]."""
    found = next((p for name in GATE if (p := getattr(module, name, None)) is not None), None)
    return (None, None) if found is None else (weight_rows(found), found.bias)


def _halves(rows: Tensor | None, d_head: int) -> tuple[Any, Any]:
    """Return the first and the second d_head rows of every head; nothing of nothing."""
    if rows is None:
        return None, None
    first, second = rows.unflatten(0, (-1, 2, d_head)).unbind(dim=1)
    return first.flatten(0, 1), second.flatten(0, 1)


def _norms(module: Any) -> dict[str, list[Any]]:
    """Return the norms of queries and keys, by "q" and "k", one for all heads or one for each.

    Nothing if there are none.
    """
    for names in QK_NORMS:
        norms = [getattr(module, name, None) for name in names]
        if all(norm is not None for norm in norms):  # StableLM has one for each head
            return dict(zip("qk", (list(getattr(n, "norms", [n])) for n in norms), strict=True))
    return {}


def qk_norm_of(module: Any, n_heads: int) -> QKNorm | None:
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
    kind = qk_norm_of(module, n_heads["q"])
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
