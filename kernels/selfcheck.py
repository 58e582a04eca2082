"""Check, once a kind of tensors, that the Triton path agrees with the definition.

Before `backend="auto"` takes Triton it runs the kernels that it is about to use, for the same
dtype, widths and options, on a small example and compares them with reference.py in float64. A GPU,
a driver or a Triton release that gets them wrong then costs speed, not a training run.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, torch_path
from .reference import Score

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Relative errors allowed, of the norm of a result; half precision rounds the tiles."""
SEQ = 144
"""Positions of the example: more than a tile, and no whole number of them."""
N_QK_HEADS = 2
TOP_K = 32


class AttentionKind(NamedTuple):
    """The properties of tensors that the attention kernels are compiled for."""

    @property
    def operator(self) -> str:
        """Name of the operator."""
        return "top-k attention"

    device: torch.device
    dtype: torch.dtype
    d_qk_head: int
    group: int
    """OV heads per QK head"""
    n_ov_heads: int
    select: str
    window: bool
    """Whether there is a window"""
    softcap: bool
    """Whether there is a softcap"""
    sinks: bool = False
    """Whether there are sinks"""
    gate: bool = False
    """Whether there is a gate"""


class DecodeKind(NamedTuple):
    """The properties of tensors that the kernels of decode and dot are compiled for."""

    device: torch.device
    dtype: torch.dtype

    @property
    def operator(self) -> str:
        """Name of the operator."""
        return "decode"


class LinearKind(NamedTuple):
    """The properties of tensors that the kernels of a linear map's top_k are compiled for."""

    device: torch.device
    dtype: torch.dtype
    n_features: int
    select: str

    @property
    def operator(self) -> str:
        """Name of the operator."""
        return "top-k linear map"


Kind = AttentionKind | DecodeKind | LinearKind


def why_not_triton(path: Any, kind: Kind) -> str | None:
    """Return what is wrong with an operator of a path, the Triton one; None if nothing is."""
    own_precision = torch.autocast(kind.device.type, enabled=False)  # whatever the caller's is
    try:
        with torch.inference_mode(False), torch.enable_grad(), own_precision:
            if isinstance(kind, DecodeKind):
                return _compare_decode(path, kind)
            if isinstance(kind, LinearKind):
                by_score = kind.n_features, kind.select
                return _compare_linear(path, kind) or _compare_selection(path, kind, *by_score)
            by_score = kind.n_ov_heads, kind.select
            return _compare_attention(path, kind) or _compare_selection(path, kind, *by_score)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # whatever the compiler or the driver raises
        lines = str(error).splitlines() or [""]
        return f"it raised {type(error).__name__}: {lines[0]}"


def _compare_attention(path: Any, kind: AttentionKind) -> str | None:
    """Compare acts and gradients with all heads kept, so that no choice hangs on rounding."""
    generator = torch.Generator().manual_seed(0)
    n_ov_heads = N_QK_HEADS * kind.group
    shapes: list[tuple[int, ...]] = [(1, SEQ, N_QK_HEADS, kind.d_qk_head)] * 2 + [
        (1, SEQ, n_ov_heads)
    ]
    shapes += [(N_QK_HEADS,)] if kind.sinks else []
    given = [torch.randn(shape, generator=generator).to(kind.dtype) for shape in shapes]
    weight = torch.randn(1, SEQ, n_ov_heads, generator=generator)

    norm = torch.ones(n_ov_heads, device=kind.device)
    window, softcap = SEQ // 2 if kind.window else None, 2.0 if kind.softcap else None
    score = Score(kind.d_qk_head**-0.5, softcap, window)
    gate = torch.rand(1, SEQ, n_ov_heads, generator=generator).to(kind.dtype)

    def run(by: Any, dtype: torch.dtype) -> dict[str, Any]:
        leaves = [t.to(kind.device, dtype, copy=True).requires_grad_() for t in given]
        q, k, v = leaves[:3]
        extras = (
            leaves[3] if kind.sinks else None,
            gate.to(kind.device, dtype) if kind.gate else None,
        )
        acts, _ids = by.sparse_topk_attention(q, k, v, norm, n_ov_heads, "abs", score, *extras)
        (acts.double() * weight.to(kind.device)).sum().backward()
        names = ("dq", "dk", "dv", "dsinks")
        grads: dict[str, Any] = {name: t.grad for name, t in zip(names, leaves, strict=False)}
        return {"acts": acts.detach(), **grads}

    return _worst(run(path, kind.dtype), run(reference, torch.float64), kind.dtype)


def _compare_selection(path: Any, kind: Kind, n_features: int, select: str) -> str | None:
    """Compare which heads are kept of given z, ties included: exactly."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, n_features, generator=generator).round(decimals=2).to(kind.device)
    norm = torch.rand(n_features, generator=generator).round(decimals=1).to(kind.device)
    top_k = min(TOP_K, n_features)
    found, expected = (
        by.select_top_k(z, norm, top_k=top_k, select=select) for by in (path, torch_path)
    )
    same = torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    return None if same else "it keeps other features than the definition"


def _compare_linear(path: Any, kind: LinearKind) -> str | None:
    """Compare acts and gradients with all features kept, and widths off the tiles."""
    device, dtype, _n_features, _select = kind
    generator = torch.Generator().manual_seed(3)
    x, W = (torch.randn(*s, generator=generator).to(dtype) for s in ((1, SEQ, 90), (200, 90)))
    b = torch.randn(200, generator=generator).to(dtype)
    weight = torch.randn(1, SEQ, 200, generator=generator).to(device)
    norm = torch.ones(200, device=device)

    def run(by: Any, *given: Tensor) -> dict[str, Any]:
        leaves = [t.to(device, copy=True).requires_grad_() for t in given]
        acts, _ids = by.sparse_topk_linear(*leaves, norm, 200, "abs")
        (acts.double() * weight).sum().backward()
        grads: dict[str, Any] = {f"d{n}": t.grad for n, t in zip("xWb", leaves, strict=True)}
        return {"acts": acts.detach(), **grads}

    found = run(path, x, W, b)
    return _worst(found, run(reference, x.double(), W.double(), b.double()), dtype)


def _compare_decode(path: Any, kind: DecodeKind) -> str | None:
    """Compare y_hat and gradients, with widths off the tiles."""
    device, dtype = kind
    generator = torch.Generator().manual_seed(2)
    acts = torch.rand(1, SEQ, 20, generator=generator).to(dtype)
    ids = torch.randint(0, 90, acts.shape, generator=generator, dtype=torch.int32).to(device)
    W_O = torch.randn(90, 300, generator=generator).to(dtype)
    weight = torch.randn(1, SEQ, 300, generator=generator).to(device)

    def run(by: Any, *given: Tensor) -> dict[str, Any]:
        leaves = [t.to(device, copy=True).requires_grad_() for t in given]
        y_hat = by.sparse_decode(leaves[0], ids, leaves[1])
        (y_hat.double() * weight).sum().backward()
        return {"y_hat": y_hat.detach(), "d_acts": leaves[0].grad, "dW_O": leaves[1].grad}

    found = run(path, acts, W_O)
    return _worst(found, run(reference, acts.double(), W_O.double()), dtype)


def _worst(found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Return the first result that is too far from the expected one, in words."""
    for name, value in found.items():
        error = (value.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        if not error <= TOLERANCES[dtype]:  # NaN is wrong too
            return f"its {name} is {float(error):.1e} off, relative to the definition"
    return None
