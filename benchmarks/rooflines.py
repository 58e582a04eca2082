"""The operators of a training step, timed one by one, and the share of its roofline each reaches.

The roofline is the larger of operations / (matmul rate) and bytes / (copy rate), with both rates
measured here. bench_step.py reports what this file finds.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from dense_baseline import dense_encode, dense_qkv, sliced_attention, tuned_encode
from lorsa.kernels.dispatch import (
    choose_path,
    sparse_decode,
    sparse_topk_attention,
    sparse_topk_linear,
)
from step_cases import Case
from torch import Tensor

WIDEST = {"lorsa": "attention", "sae": "encode", "transcoder": "encode"}
"""Operator of each kind whose dense backward is timed as well."""


def arithmetic(device: torch.device) -> AbstractContextManager[Any]:
    """Return the precision of a training step: bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


class Cost(NamedTuple):
    """What an operator has to do at the least."""

    operations: float
    """Multiplications and additions of matrix products"""
    n_bytes: float
    """Read and written"""


def operators(case: Case, rounds: int) -> dict[str, dict[str, float | None]]:
    """Return for every operator its median milliseconds and the share of its roofline."""
    device = case.x.device
    matmul_rate, copy_rate = ceilings(device)
    found: dict[str, dict[str, float | None]] = {}
    pieces = lorsa_pieces if case.kind == "lorsa" else linear_pieces
    for name, (work, cost) in pieces(case).items():
        ms = median_ms(work, device, rounds)
        least = max(cost.operations / matmul_rate, cost.n_bytes / copy_rate)
        found[name] = {"ms": ms, "roofline_fraction": 1e3 * least / ms}
    dense_backward = attention_backward_ms if case.kind == "lorsa" else encode_backward_ms
    for side in ("dense", "tuned"):
        found[f"{WIDEST[case.kind]} backward"][f"{side}_ms"] = dense_backward(case, rounds, side)
    return found


def median_ms(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Return the median milliseconds of a call, after two that are not counted."""
    return statistics.median([milliseconds(work, device) for _ in range(rounds + 2)][2:])


def attention_backward_ms(case: Case, rounds: int, side: str) -> float | None:
    """Return how long autograd takes for the batch's attention; None where a sequence does not fit.

    As many sequences at a time as fit, plainly or, tuned, with `sliced_attention`.
    """
    p, x, scale = case.preset, case.x, case.dictionary.config.scale
    n_seqs = p.batch
    while n_seqs:
        try:
            with torch.no_grad(), arithmetic(x.device):
                q, k, v = (t.transpose(1, 2) for t in dense_qkv(case.dictionary, x[:n_seqs]))
            q, k, v = (t.detach().to(q.dtype).requires_grad_() for t in (q, k, v))
            if side == "tuned":
                z = sliced_attention(q, k, v, scale)
            else:
                z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            work = backward(z, [q, k, v], torch.randn_like(z))
            return p.batch / n_seqs * median_ms(work, x.device, rounds)
        except torch.OutOfMemoryError:
            n_seqs //= 2
    return None


def encode_backward_ms(case: Case, rounds: int, side: str) -> float | None:
    """Return how long autograd takes for the batch's dense encoding; None where it does not fit."""
    encode = dense_encode if side == "dense" else tuned_encode
    try:
        with arithmetic(case.x.device):
            acts, _ids = encode(case.dictionary, case.x)
        work = backward(acts, encoder_leaves(case), torch.randn_like(acts))
        return median_ms(work, case.x.device, rounds)
    except torch.OutOfMemoryError:
        return None


def encoder_leaves(case: Case) -> list[Tensor]:
    """Return the parameters that an SAE's or a transcoder's encoder has gradients for."""
    d = case.dictionary
    return [d.W_E, d.b_E, d.b_O] if case.kind == "sae" else [d.W_E, d.b_E]


def backward(output: Tensor, inputs: list[Tensor], grad: Tensor) -> Callable[[], Any]:
    """Return a call that differentiates an output."""
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def ceilings(device: torch.device) -> tuple[float, float]:
    """Return the device's matmul operations and copied bytes (read and written) per second."""
    side = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 27), device=device)
    target = torch.empty_like(source)
    multiply = min(milliseconds(lambda: a @ a, device) for _ in range(8))
    move = min(milliseconds(lambda: target.copy_(source), device) for _ in range(8))
    return 2e3 * side**3 / multiply, 2e3 * 4 * source.numel() / move


Pieces = dict[str, tuple[Callable[[], Any], Cost]]
"""Operators of a step, each as a call with its least cost."""


def lorsa_pieces(case: Case) -> Pieces:
    """Return the operators of a Lorsa's step."""
    p, lorsa, x = case.preset, case.dictionary, case.x
    cuda = x.device.type == "cuda"
    dtype, size = (torch.bfloat16, 2) if cuda else (torch.float32, 4)
    tokens, group = p.batch * p.seq, p.n_features // p.n_qk_heads
    wide = 2 * p.n_qk_heads * p.d_qk_head + p.n_features  # q, k and v of a token
    pairs = p.batch * p.n_qk_heads * p.seq * (p.seq + 1) / 2  # of positions that see each other
    path = choose_path(lorsa.backend, x.device.type)
    with torch.no_grad(), arithmetic(x.device):
        q, k = (t.to(dtype) for t in lorsa.queries_keys(x))
        v = lorsa.values(x).to(dtype)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    W_O = lorsa.W_O.detach().to(dtype).requires_grad_()
    norm = lorsa.W_O.detach().norm(dim=1)

    def attend() -> tuple[Tensor, Tensor]:
        return sparse_topk_attention(
            q, k, v, norm, top_k=p.top_k, scale=lorsa.config.scale, backend=lorsa.backend
        )

    acts, ids = attend()
    kept = acts.detach().requires_grad_()
    y_hat = sparse_decode(kept, ids, W_O, backend=lorsa.backend)
    d_acts, dy = torch.randn_like(acts), torch.randn_like(y_hat)
    scratch = torch.randn(min(tokens, p.seq), p.n_features, device=x.device)
    firing = firing_share(ids, acts, group, p.n_qk_heads)

    def project() -> Tensor:
        with arithmetic(x.device):
            parts = (*lorsa.queries_keys(x), lorsa.values(x))
            return torch.stack([t.float().sum() for t in parts]).sum()

    gathered = tokens * p.top_k * p.d_model * size
    matmul = 2 * tokens * p.d_model * wide
    qkv_bytes, kept_bytes = tokens * wide * size, tokens * p.top_k * (size + 4)
    return {
        "projections": (
            project,
            Cost(matmul, qkv_bytes + wide * p.d_model * 4),
        ),
        "attention": (
            attend,
            Cost(2 * pairs * (p.d_qk_head + group), qkv_bytes + kept_bytes),
        ),
        "select": (
            lambda: path.select_top_k(scratch, norm, top_k=p.top_k, select="relu"),
            Cost(0, scratch.numel() * 4 + len(scratch) * p.top_k * 8),
        ),
        "attention backward": (
            backward(acts, [q, k, v], d_acts),
            Cost(2 * firing * pairs * (3 * p.d_qk_head + 2 * group), 2 * qkv_bytes + kept_bytes),
        ),
        "decode": (
            lambda: sparse_decode(kept, ids, W_O, backend=lorsa.backend),
            Cost(0, gathered + tokens * p.d_model * size),
        ),
        "decode backward": (
            backward(y_hat, [kept, W_O], dy),
            Cost(0, 2 * gathered + p.n_features * p.d_model * size),
        ),
    }


def linear_pieces(case: Case) -> Pieces:
    """Return the operators of an SAE's or a transcoder's step."""
    p, dictionary, x = case.preset, case.dictionary, case.x
    cuda = x.device.type == "cuda"
    dtype, size = (torch.bfloat16, 2) if cuda else (torch.float32, 4)
    tokens, backend = p.batch * p.seq, dictionary.backend
    path = choose_path(backend, x.device.type)
    norm = dictionary.W_O.detach().norm(dim=1)
    read = x.to(dtype)
    W_E, b_E, W_O = (
        t.detach().to(dtype).requires_grad_()
        for t in (dictionary.W_E, dictionary.b_E, dictionary.W_O)
    )

    def encode() -> tuple[Tensor, Tensor]:
        return sparse_topk_linear(read, W_E, b_E, norm, top_k=p.top_k, backend=backend)

    acts, ids = encode()
    kept = acts.detach().requires_grad_()
    y_hat = sparse_decode(kept, ids, W_O, backend=backend)
    d_acts, dy = torch.randn_like(acts), torch.randn_like(y_hat)
    scratch = torch.randn(min(tokens, p.seq), p.n_features, device=x.device)
    weights, gathered = p.n_features * p.d_model * size, tokens * p.top_k * p.d_model * size
    product = Cost(2 * tokens * p.d_model * p.n_features, tokens * p.d_model * size + weights)
    return {
        "encode": (encode, product),
        "select": (
            lambda: path.select_top_k(scratch, norm, top_k=p.top_k, select="relu"),
            Cost(0, scratch.numel() * 4 + len(scratch) * p.top_k * 8),
        ),
        "encode backward": (backward(acts, [W_E, b_E], d_acts), Cost(0, gathered + weights)),
        "decode": (
            lambda: sparse_decode(kept, ids, W_O, backend=backend),
            Cost(0, gathered + tokens * p.d_model * size),
        ),
        "decode backward": (backward(y_hat, [kept, W_O], dy), Cost(0, 2 * gathered + weights)),
    }


def firing_share(ids: Tensor, acts: Tensor, group: int, n_qk_heads: int) -> float:
    """Return the share of (token, QK head) pairs at which a head fired."""
    fired = torch.zeros(*ids.shape[:2], n_qk_heads, device=ids.device)
    fired.scatter_reduce_(-1, ids.long() // group, (acts > 0).float(), "amax")
    return float(fired.mean())
