"""The four operators, and the path that runs them: check the tensors, choose a path, run it.

    acts, ids = sparse_topk_attention(q, k, v, w_o_norm, top_k=64, scale=d_qk_head ** -0.5)
    acts, ids = sparse_topk_linear(x, W, b, norm, top_k=32)
    y_hat     = sparse_decode(acts, ids, W_O)
    h         = sparse_dot(x, ids, W)

`reference` defines the result; `torch` is the same in blocks, for any device and quick on CPUs;
`triton` is for GPUs. `auto` takes Triton on a GPU, once a small example has shown that it agrees
with the definition there, else torch. A path computes in the precision of its inputs or better,
also inside an autocast region.
"""

import importlib
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import reference, torch_path
from .choices import BACKENDS, SELECTIONS
from .reference import Score
from .selfcheck import AttentionKind, DecodeKind, Kind, LinearKind, why_not_triton

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


@cache
def choose_path(backend: str, device: str) -> ModuleType:
    """Return the module that serves a backend on a kind of device; logged once for each pair.

    Raises:
        ValueError: no such backend, or it cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    path = reference if backend == "reference" else torch_path
    if backend == "triton" or (backend == "auto" and device == "cuda"):
        reason = _why_no_triton(device)
        if reason is None:
            path = importlib.import_module(".triton_path", __package__)
        elif backend == "triton":
            raise ValueError(f"backend 'triton' cannot run here: {reason}; use 'torch'")
    logger.info("sparse attention on %s: backend %s", device, path.__name__.rpartition(".")[2])
    return path


def _why_no_triton(device: str) -> str | None:
    """Return why Triton cannot run on a kind of device; None if it can."""
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, and TRITON_INTERPRET is not 1"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"the package triton cannot be imported ({error})"
    return None


@cache
def _path_for(backend: str, kind: Kind) -> ModuleType:
    """Return the path for an operator's tensors; why `auto` leaves Triton is logged once.

    Raises:
        ValueError: the backend asked for cannot run, or does not take the dtype.
    """
    path = choose_path(backend, kind.device.type)
    if not path.__name__.endswith(".triton_path"):
        return path
    if kind.dtype not in TRITON_DTYPES:
        if backend == "auto":
            return torch_path
        raise ValueError(f"backend 'triton' takes float32, bfloat16 and float16, not {kind.dtype}")
    reason = why_not_triton(path, kind) if backend == "auto" else None
    if reason is None:
        return path
    logger.warning(
        "Triton's sparse %s is not used on %s, %s: %s; the torch path takes its place",
        kind.operator,
        kind.device,
        kind.dtype,
        reason,
    )
    return torch_path


def _check_attention(q: Tensor, k: Tensor, v: Tensor, w_o_norm: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit each other."""
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(
            "q and k must both be [batch, seq, n_qk_heads, d_qk_head]; "
            f"q is {list(q.shape)}, k is {list(k.shape)}"
        )
    if q.numel() == 0:
        raise ValueError(f"the batch is empty: q is {list(q.shape)}")
    batch, seq, n_qk_heads, _width = q.shape
    if v.ndim != 3 or v.shape[:2] != (batch, seq):
        raise ValueError(
            f"v must be [{batch}, {seq}, n_ov_heads], as q has it; v is {list(v.shape)}"
        )
    n_ov_heads = v.shape[2]
    if n_ov_heads == 0 or n_ov_heads % n_qk_heads:
        raise ValueError(
            f"n_ov_heads must be a multiple of n_qk_heads; "
            f"v has {n_ov_heads} OV heads, q has {n_qk_heads} QK heads"
        )
    if w_o_norm.shape != (n_ov_heads,):
        raise ValueError(f"w_o_norm must be [{n_ov_heads}]; it is {list(w_o_norm.shape)}")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.is_floating_point():
        raise ValueError(
            "q, k and v must have one floating dtype; "
            f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}"
        )
    if len({t.device for t in (q, k, v, w_o_norm)}) > 1:
        raise ValueError(
            f"q, k, v and w_o_norm must be on one device; q is on {q.device}, k on {k.device}, "
            f"v on {v.device}, w_o_norm on {w_o_norm.device}"
        )


def sparse_topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o_norm: Tensor,
    *,
    top_k: int,
    scale: float,
    select: str = "relu",
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend with scalar value heads and keep the top_k heads of every token.

    z_pre[b, t, i] = sum_{s <= t} softmax_s(scale * <q[b, t, h], k[b, s, h]>) * v[b, s, i]
    score[b, t, i] = select(z_pre[b, t, i]) * w_o_norm[i],   h = i // (n_ov_heads // n_qk_heads)

    With sinks, exp(sinks[h]) is in the denominator of the softmax too. Gradients flow to q, k, v,
    sinks and gate through the kept heads alone. Tensors need not be contiguous.

    Args:
        q, k: rotated queries and keys, [batch, seq, n_qk_heads, d_qk_head].
        v: one scalar per OV head, [batch, seq, n_ov_heads], dtype and device of q.
        w_o_norm: ||W_O[i]||, [n_ov_heads]; takes part in the choice only, gets no gradient.
        top_k: heads kept per token, 1..n_ov_heads.
        scale: multiplies the scores, usually d_qk_head ** -0.5.
        select: "relu" keeps the largest positive z_pre, "abs" the largest in size.
        window: a query sees itself and the window - 1 positions before it; None sees all before.
        chunk: a query sees the keys of its own chunk of so many positions; None sees all before.
        softcap: scores become softcap * tanh(scores / softcap) before the softmax.
        sinks: score of what each QK head attends to besides, which has no value, [n_qk_heads].
        gate: factors of z_pre, not negative, [batch, seq, n_ov_heads]; None is 1.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        acts: z of the kept heads, [batch, seq, top_k], dtype of v; with "relu" zero where a token
            has fewer than top_k positive heads.
        ids: the kept heads, ascending, int32, [batch, seq, top_k]; of equal scores the lowest id.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is out of range, or the backend
            asked for cannot run here.

    Source: He et al. 2025, arXiv:2504.20938, section 3; our v is their x W_V^h, our z their head
    activation.
    """
    _check_attention(q, k, v, w_o_norm)
    _check_extras(q, v, sinks, gate)
    _check_options(v.shape[2], top_k, select, window=window, softcap=softcap, chunk=chunk)
    batch, seq, n_qk_heads, width = q.shape
    factor = None if gate is None else gate.detach()
    if chunk is not None and chunk < seq:  # the chunks are sequences of their own
        q, k, v = (_in_chunks(t, chunk) for t in (q, k, v))
        factor = None if factor is None else _in_chunks(factor, chunk)
    there = (option is not None for option in (window, softcap, sinks, gate))
    kind = AttentionKind(
        q.device, q.dtype, width, v.shape[2] // n_qk_heads, v.shape[2], select, *there
    )
    path, norm, score = _path_for(backend, kind), w_o_norm.detach(), Score(scale, softcap, window)
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        acts, ids = path.sparse_topk_attention(q, k, v, norm, top_k, select, score, sinks, factor)
    acts, ids = (t.reshape(batch, -1, top_k)[:, :seq] for t in (acts, ids))
    if gate is not None:  # is 1; what it is divided by gets no gradient
        kept = gate.gather(-1, ids.long()).clamp_min(torch.finfo(gate.dtype).tiny)
        acts = acts * (kept / kept.detach())
    return acts, ids


def _check_options(n_ov_heads: int, top_k: int, select: str, **options: float | None) -> None:
    """Raise ValueError unless options of the attention are in their ranges."""
    if not 1 <= top_k <= n_ov_heads:
        raise ValueError(f"top_k is {top_k}; allowed: 1..{n_ov_heads} (n_ov_heads)")
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}; allowed: {', '.join(SELECTIONS)}")
    for name, value in options.items():
        least = "above 0" if name == "softcap" else "1 or more"
        if value is not None and (value <= 0 or (value < 1 and name != "softcap")):
            raise ValueError(f"{name} is {value}; allowed: {least}, or None")


def _check_extras(q: Tensor, v: Tensor, sinks: Tensor | None, gate: Tensor | None) -> None:
    """Raise ValueError unless sinks and gate fit the rest."""
    for name, extra, shape in (("sinks", sinks, q.shape[2:3]), ("gate", gate, v.shape)):
        if extra is None:
            continue
        if extra.shape != shape or not extra.is_floating_point() or extra.device != q.device:
            raise ValueError(
                f"{name} must be {list(shape)}, floating, on {q.device}; it is "
                f"{list(extra.shape)}, {extra.dtype}, on {extra.device}"
            )


def _in_chunks(t: Tensor, size: int) -> Tensor:
    """Return a tensor [batch, seq, ...] as chunks, [batch * chunks, size, ...], the last padded."""
    short = -t.shape[1] % size
    t = torch.cat([t, t.new_zeros(t.shape[0], short, *t.shape[2:])], dim=1) if short else t
    chunks: Tensor = t.unflatten(1, (-1, size)).flatten(0, 1)
    return chunks


def sparse_decode(acts: Tensor, ids: Tensor, W_O: Tensor, *, backend: str = "auto") -> Tensor:
    """Sum the kept heads' output directions.

    y_hat[b, t] = sum_j acts[b, t, j] * W_O[ids[b, t, j]]

    Equivalent to zeros(batch, seq, n_ov_heads).scatter_add(-1, ids, acts) @ W_O, without the zeros.

    Args:
        acts: [batch, seq, top_k].
        ids: heads in 0..n_ov_heads - 1, integer, [batch, seq, top_k].
        W_O: output directions, [n_ov_heads, d_model], dtype and device of acts.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        y_hat without the bias b_O, [batch, seq, d_model], dtype of acts.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot run here.
    """
    if acts.ndim != 3 or acts.shape != ids.shape:
        raise ValueError(
            "acts and ids must both be [batch, seq, top_k]; "
            f"acts is {list(acts.shape)}, ids is {list(ids.shape)}"
        )
    _check_gathered("acts", acts, ids, "W_O", W_O)
    path = _path_for(backend, DecodeKind(acts.device, acts.dtype))
    with torch.cuda.device_of(acts), torch.autocast(acts.device.type, enabled=False):
        y_hat: Tensor = path.sparse_decode(acts, ids, W_O)
    return y_hat


def sparse_topk_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    norm: Tensor,
    *,
    top_k: int,
    select: str = "relu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Keep the top_k features of a linear map of every token.

    z[b, t, i]     = <x[b, t], W[i]> + b[i]
    score[b, t, i] = select(z[b, t, i]) * norm[i]

    The dense z of a few tokens at a time is a scratch; none is saved. Gradients flow to x, W and b
    through the kept features alone.

    Args:
        x: [batch, seq, width].
        W: read directions, [n_features, width], dtype and device of x.
        b: biases, [n_features], alike.
        norm: factors of the scores, [n_features]; takes part in the choice only, gets no gradient.
        top_k: features kept per token, 1..n_features.
        select: "relu" keeps the largest positive z, "abs" the largest in size.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        acts: z of the kept features, [batch, seq, top_k], dtype of x; with "relu" zero where a
            token has fewer than top_k positive features.
        ids: the kept features, ascending, int32, [batch, seq, top_k]; of equal scores the lowest.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is out of range, or the backend
            asked for cannot run here.

    Source: Gao et al. 2024, arXiv:2406.04093, section 2.3, with W their W_enc and b their b_enc.
    """
    _check_linear(x, W, b, norm)
    n_features = len(W)
    if not 1 <= top_k <= n_features:
        raise ValueError(f"top_k is {top_k}; allowed: 1..{n_features} (n_features)")
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}; allowed: {', '.join(SELECTIONS)}")
    path = _path_for(backend, LinearKind(x.device, x.dtype, n_features, select))
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        acts, ids = path.sparse_topk_linear(x, W, b, norm.detach(), top_k, select)
    return acts, ids


def _check_linear(x: Tensor, W: Tensor, b: Tensor, norm: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit each other."""
    if x.ndim != 3 or x.numel() == 0:
        raise ValueError(f"x must be [batch, seq, width] and not empty; it is {list(x.shape)}")
    if W.ndim != 2 or W.shape[1] != x.shape[2] or not len(W):
        raise ValueError(
            f"W must be [n_features, {x.shape[2]}], as x has it; it is {list(W.shape)}"
        )
    if b.shape != (len(W),) or norm.shape != (len(W),):
        raise ValueError(
            f"b and norm must be [{len(W)}]; b is {list(b.shape)}, norm is {list(norm.shape)}"
        )
    if not x.dtype == W.dtype == b.dtype or not x.is_floating_point():
        raise ValueError(
            f"x, W and b must have one floating dtype; x is {x.dtype}, W is {W.dtype}, "
            f"b is {b.dtype}"
        )
    if len({t.device for t in (x, W, b, norm)}) > 1:
        raise ValueError(
            f"x, W, b and norm must be on one device; x is on {x.device}, W on {W.device}, "
            f"b on {b.device}, norm on {norm.device}"
        )


def sparse_dot(x: Tensor, ids: Tensor, W: Tensor, *, backend: str = "auto") -> Tensor:
    """Return dot products of every token with a few rows of a matrix.

    h[b, t, j] = <x[b, t], W[ids[b, t, j]]>

    Equivalent to (x @ W.T).gather(-1, ids), without the dense product. Gradients flow to x and W.

    Args:
        x: [batch, seq, width].
        ids: rows in 0..n_features - 1, integer, [batch, seq, slots].
        W: [n_features, width], dtype and device of x.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        h, [batch, seq, slots], dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot run here.
    """
    if x.ndim != 3 or ids.ndim != 3 or x.shape[:2] != ids.shape[:2]:
        raise ValueError(
            "x must be [batch, seq, width] and ids [batch, seq, slots]; "
            f"x is {list(x.shape)}, ids is {list(ids.shape)}"
        )
    _check_gathered("x", x, ids, "W", W)
    if W.shape[1] != x.shape[2]:
        raise ValueError(
            f"W must be [n_features, {x.shape[2]}], as x has it; it is {list(W.shape)}"
        )
    path = _path_for(backend, DecodeKind(x.device, x.dtype))
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        h: Tensor = path.sparse_dot(x, ids, W)
    return h


def _check_gathered(name: str, given: Tensor, ids: Tensor, weights: str, W: Tensor) -> None:
    """Raise ValueError unless ids can choose rows of W for what is given."""
    if ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(f"ids must be integers and some; they are {ids.dtype}, {list(ids.shape)}")
    if W.ndim != 2:
        raise ValueError(f"{weights} must be [n_features, width]; it is {list(W.shape)}")
    if given.dtype != W.dtype or not given.device == ids.device == W.device:
        raise ValueError(
            f"{name} and {weights} must share dtype and device; {name} is {given.dtype} on "
            f"{given.device}, {weights} is {W.dtype} on {W.device}, ids are on {ids.device}"
        )
