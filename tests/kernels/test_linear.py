"""The top_k of a linear map, and sparse dots: fast paths against the definition, by name."""

from typing import Any

import pytest
import torch
from lorsa.kernels import reference, torch_sparse
from lorsa.kernels.dispatch import choose_path, sparse_decode, sparse_dot, sparse_topk_linear
from lorsa.kernels.selfcheck import LinearKind, why_not_triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RTOL = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# batch, seq, width, n_features, top_k, select
CASES = [
    pytest.param(1, 1, 3, 5, 1, "relu", id="one-token"),
    pytest.param(2, 63, 20, 90, 7, "relu", id="odd-63"),
    pytest.param(1, 70, 140, 150, 32, "relu", id="widths-off-the-tile"),
    pytest.param(2, 40, 16, 12, 12, "relu", id="top-k-all"),
    pytest.param(1, 70, 33, 129, 64, "abs", id="abs"),
]


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each fast path."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def _inputs(
    batch: int, seq: int, width: int, n_features: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seq + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return {
        "x": draw(batch, seq, width),
        "W": draw(n_features, width),
        "b": draw(n_features),
        "W_O": draw(n_features, width + 1),
    }


def _run(
    inputs: dict[str, Tensor], backend: str, top_k: int, select: str = "relu"
) -> dict[str, Tensor]:
    """Encode, decode, and read what was kept once more by a dot; all gradients."""
    leaves = {name: t.clone().to(DEVICE).requires_grad_() for name, t in inputs.items()}
    x, W, b, W_O = leaves.values()
    norm = W_O.detach().norm(dim=1)
    acts, ids = sparse_topk_linear(x, W, b, norm, top_k=top_k, select=select, backend=backend)
    y_hat = sparse_decode(acts, ids, W_O, backend=backend)
    h = sparse_dot(x, ids, W, backend=backend)
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in (y_hat, h)]
    total = (y_hat * weights[0].to(DEVICE)).sum() + (h * weights[1].to(DEVICE)).sum()
    total.backward()  # type: ignore[no-untyped-call]
    grads = {f"{name}.grad": t.grad for name, t in leaves.items()}
    return {
        "acts": acts.detach(),
        "ids": ids,
        "y_hat": y_hat.detach(),
        "h": h.detach(),
        **grads,  # type: ignore[dict-item]
    }


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert torch.equal(found["ids"], expected["ids"])
    return {
        name: float((found[name] - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in expected.items()
        if name != "ids"
    }


def test_the_definition_is_the_equation() -> None:
    x, W, b, _W_O = _inputs(1, 4, 3, 6).values()
    acts, ids = reference.sparse_topk_linear(x, W, b, torch.ones(6), 2, "relu")
    for t in range(4):
        z = [float(W[i] @ x[0, t] + b[i]) for i in range(6)]
        best = sorted(sorted(range(6), key=lambda i: -max(z[i], 0.0))[:2])
        assert ids[0, t].tolist() == best
        assert acts[0, t].tolist() == pytest.approx([max(z[i], 0.0) for i in best], abs=1e-6)
    h = reference.sparse_dot(x, ids, W)
    assert float(h[0, 1, 1]) == pytest.approx(float(x[0, 1] @ W[ids[0, 1, 1]]), abs=1e-6)


@pytest.mark.parametrize(("batch", "seq", "width", "n_features", "top_k", "select"), CASES)
def test_fast_paths_equal_the_reference(
    backend: str, batch: int, seq: int, width: int, n_features: int, top_k: int, select: str
) -> None:
    inputs = _inputs(batch, seq, width, n_features)
    expected = _run(inputs, "reference", top_k, select)
    errors = _errors(_run(inputs, backend, top_k, select), expected)
    assert max(errors.values()) < RTOL, errors


def test_ties_go_to_the_lowest_id(backend: str) -> None:
    """Whole numbers, so that many pre-activations are the same to the bit."""
    inputs = {name: t.round() for name, t in _inputs(1, 60, 4, 50).items()}
    inputs["W_O"] = torch.ones_like(inputs["W_O"])
    expected = _run(inputs, "reference", 9)
    errors = _errors(_run(inputs, backend, 9), expected)
    assert max(errors.values()) < RTOL, errors


def test_few_positive_features(backend: str) -> None:
    """Most tokens have fewer than top_k positive features: the rest adds to nothing."""
    inputs = _inputs(2, 33, 8, 40)
    inputs["b"] -= 4
    expected = _run(inputs, "reference", 9)
    n_firing = (expected["acts"] > 0).sum(-1)
    assert float((n_firing < 9).float().mean()) > 0
    assert n_firing.any()
    errors = _errors(_run(inputs, backend, 9), expected)
    assert max(errors.values()) < RTOL, errors


def test_in_blocks_of_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are computed alike in whatever scratch they fall, but for how a product is blocked."""
    inputs = _inputs(1, 50, 12, 64)
    whole = _run(inputs, backend, 5)
    name = "torch_sparse.PREACTS_AT_ONCE" if backend == "torch" else "triton_sparse.SCRATCH_BYTES"
    monkeypatch.setattr(f"lorsa.kernels.{name}", 7 * 64 * (1 if backend == "torch" else 4))
    errors = _errors(_run(inputs, backend, 5), whole)
    assert max(errors.values()) < RTOL, errors


def test_every_element_is_written(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start as NaN here, so anything left unwritten shows."""

    def poisoned(make: Any) -> Any:
        def make_poisoned(*args: Any, **settings: Any) -> Tensor:
            tensor: Tensor = make(*args, **settings)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return make_poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    found = _run(_inputs(1, 70, 21, 130), backend, 7)
    assert all(t.isfinite().all() for t in found.values())


def test_the_same_bits_twice(backend: str) -> None:
    inputs = _inputs(2, 50, 16, 70)
    first, second = (_run(inputs, backend, 5) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_in_float64() -> None:
    inputs = _inputs(1, 5, 3, 6, torch.float64)

    def whole(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        acts, ids = sparse_topk_linear(x, W, b, torch.ones(6), top_k=2, backend="torch")
        return acts * sparse_dot(x, ids, W, backend="torch")

    leaves = [inputs[name].requires_grad_() for name in ("x", "W", "b")]
    assert torch.autograd.gradcheck(whole, leaves)


def test_an_infinite_gradient_reaches_only_what_fired(backend: str) -> None:
    inputs = _inputs(1, 9, 4, 6)
    leaves = [inputs[name].to(DEVICE).requires_grad_() for name in ("x", "W", "b")]
    norm = torch.ones(6, device=DEVICE)
    acts, _ids = sparse_topk_linear(*leaves, norm, top_k=6, backend=backend)
    assert (acts == 0).any()
    d_acts = torch.where(acts > 0, 1.0, float("inf"))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(acts, leaves, d_acts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = {name: t.to(dtype) for name, t in _inputs(1, 40, 12, 30).items()}
    found = _run(inputs, "torch", 30, "abs")
    exact = _run({name: t.float() for name, t in inputs.items()}, "torch", 30, "abs")
    assert all(t.dtype == dtype for name, t in found.items() if name != "ids")
    errors = _errors({n: t if n == "ids" else t.float() for n, t in found.items()}, exact)
    assert max(errors.values()) < 4 * torch.finfo(dtype).eps, errors


def test_strided_inputs_are_accepted(backend: str) -> None:
    inputs = _inputs(2, 30, 8, 20)
    turned = {
        "x": inputs["x"].transpose(0, 2).contiguous().transpose(0, 2),
        "W": inputs["W"].T.contiguous().T,
        "b": inputs["b"].repeat_interleave(2)[::2],
        "W_O": inputs["W_O"].T.contiguous().T,
    }
    expected, found = (_run(t, backend, 3) for t in (inputs, turned))
    errors = _errors(found, expected)
    assert max(errors.values()) < RTOL, errors


class _Largest(TorchDispatchMode):
    """Notes the size of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.seen = max(self.seen, tensor.numel())
        return out


def test_no_dense_activations_are_made_or_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of [tokens, n_features] there is nothing, forward or backward: a scratch of a few rows."""
    monkeypatch.setattr(torch_sparse, "PREACTS_AT_ONCE", 4000)
    leaves = [t.requires_grad_() for t in list(_inputs(4, 100, 10, 1000).values())[:3]]
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with _Largest() as largest, hooks:
        acts, _ids = sparse_topk_linear(*leaves, torch.ones(1000), top_k=4)
    with largest:
        torch.autograd.grad(acts.sum(), leaves)
    assert largest.seen <= 10_000  # W itself
    assert max(saved) <= 10_000


@pytest.mark.triton
@pytest.mark.parametrize(("n_features", "select"), [(60, "relu"), (9000, "abs")])
def test_the_self_check_agrees_here(n_features: int, select: str) -> None:
    pytest.importorskip("triton")
    path = choose_path("triton", DEVICE)
    kind = LinearKind(torch.device(DEVICE), torch.float32, n_features, select)
    assert why_not_triton(path, kind) is None


@pytest.mark.triton
def test_a_wrong_bias_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    path = choose_path("triton", DEVICE)
    right = path.sparse_topk_linear

    def halved(x: Tensor, W: Tensor, b: Tensor, *rest: Any) -> Any:
        return right(x, W, b * 0.5, *rest)

    monkeypatch.setattr(path, "sparse_topk_linear", halved)
    kind = LinearKind(torch.device(DEVICE), torch.float32, 60, "relu")
    reason = why_not_triton(path, kind)
    assert reason is not None
    assert reason.startswith("its acts is ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.randn(3, 8)},
            r"x must be \[batch, seq, width\] and not empty; it is \[3, 8\]",
        ),
        ({"x": torch.randn(1, 0, 8)}, "not empty"),
        ({"W": torch.randn(20, 7)}, r"W must be \[n_features, 8\]"),
        ({"b": torch.randn(19)}, r"b and norm must be \[20\]; b is \[19\]"),
        ({"W": torch.randn(20, 8).double()}, "must have one floating dtype"),
        ({"top_k": 21}, r"top_k is 21; allowed: 1..20 \(n_features\)"),
        ({"select": "max"}, "select is 'max'; allowed: relu, abs"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], message: str) -> None:
    given = {"x": torch.randn(1, 3, 8), "W": torch.randn(20, 8), "b": torch.zeros(20)}
    options = {"top_k": 4, "select": "relu"}
    given |= {name: value for name, value in changes.items() if name in given}
    options |= {name: value for name, value in changes.items() if name in options}
    with pytest.raises(ValueError, match=message):
        sparse_topk_linear(**given, norm=torch.ones(20), **options)  # type: ignore[arg-type]


def test_dots_that_do_not_fit_are_said() -> None:
    x, ids, W = torch.randn(1, 3, 8), torch.zeros(1, 3, 2, dtype=torch.int32), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"W must be \[n_features, 8\]"):
        sparse_dot(x, ids, W[:, :7])
    with pytest.raises(ValueError, match=r"x is \[1, 3, 8\], ids is \[1, 2, 2\]"):
        sparse_dot(x, ids[:, :2], W)
    with pytest.raises(ValueError, match="ids must be integers"):
        sparse_dot(x, ids.float(), W)
