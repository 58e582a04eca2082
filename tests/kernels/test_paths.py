"""The fast paths against the definition: outputs and every gradient, by name.

Without a GPU the Triton kernels run in Triton's interpreter, in float32.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lorsa.kernels import reference, torch_attention, torch_select
from lorsa.kernels.dispatch import choose_path, sparse_decode, sparse_topk_attention
from lorsa.kernels.reference import Score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RTOL = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("acts", "y_hat", "q.grad", "k.grad", "v.grad", "W_O.grad")

EXTRAS = ("sinks", "gate")

# batch, seq, n_qk_heads, d_qk_head, group, top_k, options
CASES = [
    pytest.param(1, 1, 2, 4, 3, 1, {}, id="one-token"),
    pytest.param(2, 63, 3, 8, 3, 7, {}, id="odd-63"),
    pytest.param(1, 100, 67, 6, 1, 64, {}, id="group-1"),
    pytest.param(1, 257, 3, 12, 16, 7, {}, id="three-blocks"),
    pytest.param(1, 130, 2, 8, 128, 64, {}, id="group-128"),
    pytest.param(2, 40, 3, 8, 4, 12, {}, id="top-k-all"),
    pytest.param(1, 140, 3, 8, 5, 7, {"select": "abs"}, id="abs"),
    pytest.param(1, 140, 3, 8, 5, 7, {"window": 17}, id="window"),
    pytest.param(1, 300, 2, 8, 3, 4, {"window": 2}, id="window-2"),
    pytest.param(1, 140, 3, 8, 5, 7, {"softcap": 1.5}, id="softcap"),
    pytest.param(1, 140, 3, 8, 5, 7, {"softcap": 1.5, "window": 9}, id="softcap-window"),
    pytest.param(1, 140, 3, 8, 5, 7, {"sinks": True}, id="sinks"),
    pytest.param(2, 140, 3, 8, 5, 7, {"sinks": True, "window": 9, "softcap": 1.5}, id="sinks-all"),
    pytest.param(1, 140, 3, 8, 5, 7, {"gate": True}, id="gate"),
    pytest.param(
        2, 140, 3, 8, 5, 7, {"gate": True, "sinks": True, "select": "abs", "chunk": 33}, id="all"
    ),
]


def _inputs(
    batch: int, seq: int, heads: int, width: int, group: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seq + heads + group)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return {
        "q": draw(batch, seq, heads, width),
        "k": draw(batch, seq, heads, width),
        "v": draw(batch, seq, heads * group),
        "W_O": draw(heads * group, 20),
    }


def _with_extras(inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Return inputs with the sinks and the gate that options ask for."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"sinks": inputs["q"].shape[2:3], "gate": inputs["v"].shape}
    drawn = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return inputs | {name: drawn[name] for name in EXTRAS if name in options}


def _run(
    inputs: dict[str, Tensor], backend: str, top_k: int, options: dict[str, Any]
) -> dict[str, Tensor]:
    options = {name: value for name, value in options.items() if name not in EXTRAS}
    leaves = {name: t.clone().to(DEVICE).requires_grad_() for name, t in inputs.items()}
    acts, ids = sparse_topk_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves["W_O"].detach().norm(dim=1),
        top_k=top_k,
        scale=0.4,
        backend=backend,
        **{name: leaf for name, leaf in leaves.items() if name in EXTRAS},
        **options,
    )
    y_hat = sparse_decode(acts, ids, leaves["W_O"], backend=backend)
    weight = torch.linspace(-1, 1, y_hat.numel(), dtype=y_hat.dtype, device=DEVICE).view_as(y_hat)
    (y_hat * weight).sum().backward()
    grads = {f"{name}.grad": t.grad for name, t in leaves.items()}
    return {"acts": acts.detach(), "ids": ids, "y_hat": y_hat.detach(), **grads}  # type: ignore[dict-item]


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each fast path."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


@pytest.mark.parametrize(("batch", "seq", "heads", "width", "group", "top_k", "options"), CASES)
def test_fast_paths_equal_the_reference(
    backend: str,
    batch: int,
    seq: int,
    heads: int,
    width: int,
    group: int,
    top_k: int,
    options: dict[str, Any],
) -> None:
    inputs = _with_extras(_inputs(batch, seq, heads, width, group), options)
    expected = _run(inputs, "reference", top_k, options)
    found = _run(inputs, backend, top_k, options)
    assert torch.equal(found["ids"], expected["ids"])
    names = (*NAMES, *(f"{name}.grad" for name in EXTRAS if name in inputs))
    errors = {name: _relative(found[name], expected[name]) for name in names}
    assert max(errors.values()) < RTOL, errors


def test_every_element_is_written(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start as NaN here, so anything left unwritten shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, _poisoned(original))
    monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))
    found = _run(_inputs(1, 300, 2, 8, 5), backend, 7, {"window": 40})
    assert all(t.isfinite().all() for t in found.values())


def _poisoned(make: Any) -> Any:
    def poisoned(*args: Any, **settings: Any) -> Tensor:
        tensor: Tensor = make(*args, **settings)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    return poisoned


def test_the_same_bits_twice(backend: str) -> None:
    inputs = _inputs(2, 90, 3, 8, 6)
    first, second = (_run(inputs, backend, 5, {}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.triton
def test_triton_in_scratches_of_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    inputs = _inputs(3, 40, 2, 8, 4)
    whole = _run(inputs, "triton", 3, {})
    monkeypatch.setattr("lorsa.kernels.triton_attention.SCRATCH_BYTES", 1)
    parts = _run(inputs, "triton", 3, {})
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("n_ov_heads", "top_k"),
    [(50, 7), (50, 20), (64, 64), (1000, 64), (1001, 3), (33, 1), (200, 150)],
)
@pytest.mark.parametrize("select", ["relu", "abs"])
def test_fast_paths_rank_as_the_reference(
    backend: str, n_ov_heads: int, top_k: int, select: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded numbers, so that ties lie within tiles or columns and across them.

    The last rows have fewer than top_k positive entries, or none.
    """
    path = choose_path(backend, DEVICE)
    if backend == "triton":
        monkeypatch.setattr("lorsa.kernels.triton_select.SELECT_TILE", 16)
    generator = torch.Generator().manual_seed(n_ov_heads)
    z = torch.randn(6, n_ov_heads, generator=generator).round(decimals=1)
    z[4] -= 2
    z[5] = 0
    z, norm = z.to(DEVICE), torch.rand(n_ov_heads, generator=generator).round(decimals=1).to(DEVICE)
    found = path.select_top_k(z, norm, top_k=top_k, select=select)
    expected = reference.select_top_k(z, norm, top_k=top_k, select=select)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.triton
def test_triton_ranks_the_longest_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 262_144, generator=generator).to(DEVICE)
    norm = torch.rand(262_144, generator=generator).to(DEVICE)
    found = _triton_path().select_top_k(z, norm, top_k=128, select="relu")
    expected = reference.select_top_k(z, norm, top_k=128, select="relu")
    assert torch.equal(found[1], expected[1])


@pytest.mark.triton
def test_triton_wants_no_dense_activations() -> None:
    """Saved are v and nothing else of [tokens, n_ov_heads]."""
    inputs = _inputs(2, 40, 2, 8, 32)
    leaves = {name: t.to(DEVICE).requires_grad_() for name, t in inputs.items()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        norm = torch.ones(64, device=DEVICE)
        sparse_topk_attention(q, k, v, norm, top_k=4, scale=0.4, backend="triton")
    assert sorted(t.data_ptr() for t in saved if t.numel() >= v.numel()) == [v.data_ptr()]


def _triton_path() -> Any:
    pytest.importorskip("triton")
    return choose_path("triton", DEVICE)


def test_torch_path_in_small_chunks_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(1, 140, 5, 8, 3)
    whole = _run(inputs, "torch", 4, {})
    monkeypatch.setattr(torch_attention, "SCORES_AT_ONCE", 1)
    chunked = _run(inputs, "torch", 4, {})
    errors = {name: _relative(chunked[name], whole[name]) for name in NAMES}
    assert max(errors.values()) < RTOL, errors


@pytest.mark.parametrize("options", [{}, {"select": "abs", "softcap": 2.0, "window": 3}])
def test_gradients_in_float64(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "QUERY_BLOCK", 4)
    inputs = _inputs(1, 6, 2, 3, 2, torch.float64)
    norm = inputs["W_O"].norm(dim=1)

    def whole(q: Tensor, k: Tensor, v: Tensor, W_O: Tensor) -> Tensor:
        acts, ids = sparse_topk_attention(
            q, k, v, norm, top_k=2, scale=0.5, backend="torch", **options
        )
        return sparse_decode(acts, ids, W_O, backend="torch")

    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(whole, leaves)


def test_few_positive_heads(backend: str) -> None:
    """Most rows have fewer than top_k positive z: what fires is right, and so are the gradients."""
    inputs = _inputs(2, 63, 3, 8, 5)
    inputs["v"] -= 0.5
    expected, found = _run(inputs, "reference", 7, {}), _run(inputs, backend, 7, {})
    n_firing = (expected["acts"] > 0).sum(-1)
    assert 0 < float((n_firing < 7).float().mean()) < 1
    assert torch.equal(found["ids"], expected["ids"])
    errors = {name: _relative(found[name], expected[name]) for name in NAMES}
    assert max(errors.values()) < RTOL, errors


def test_gradients_are_zero_where_nothing_fires(backend: str) -> None:
    inputs = _inputs(1, 20, 2, 4, 3)
    inputs["v"] = -inputs["v"].abs()
    found = _run(inputs, backend, 2, {})
    assert not found["acts"].any()
    assert not any(found[f"{name}.grad"].any() for name in ("q", "k", "v", "W_O"))


@pytest.fixture(params=["reference", "torch", pytest.param("triton", marks=pytest.mark.triton)])
def path(request: pytest.FixtureRequest) -> Any:
    """Each path, as a module."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return choose_path(request.param, DEVICE)


def test_ties_go_to_the_lowest_id(path: Any) -> None:
    z = torch.tensor(
        [[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0], [-1.0, 0.0, -2.0, 5.0, 0.0]]
    )
    acts, ids = path.select_top_k(z, torch.ones(5), top_k=2, select="relu")
    assert ids.tolist() == [[1, 2], [0, 1], [0, 3]]
    assert acts.tolist() == [[3.0, 3.0], [2.0, 2.0], [0.0, 5.0]]
    assert ids.dtype == torch.int32


def test_selection_weighs_by_the_output_norm(path: Any) -> None:
    z = torch.tensor([[1.0, -3.0, 2.0]])
    norm = torch.tensor([5.0, 1.0, 1.0])
    assert path.select_top_k(z, norm, top_k=1, select="relu")[1].tolist() == [[0]]
    acts, ids = path.select_top_k(z, norm, top_k=2, select="abs")
    assert ids.tolist() == [[0, 1]]
    assert acts.tolist() == [[1.0, -3.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """With D made of rounded acts, dq was off by 10 % where keys have a common offset."""
    plain = _inputs(1, 70, 2, 8, 3) | {"k": _inputs(1, 70, 2, 8, 3)["k"] + 7}
    inputs = {name: t.to(dtype) for name, t in plain.items()}
    found = _run(inputs, "torch", 6, {"select": "abs"})
    exact = _run({name: t.float() for name, t in inputs.items()}, "torch", 6, {"select": "abs"})
    assert all(found[name].dtype == dtype for name in NAMES)
    errors = {name: _relative(found[name].float(), exact[name]) for name in NAMES}
    assert max(errors.values()) < 4 * torch.finfo(dtype).eps, errors


def test_an_infinite_gradient_reaches_only_what_fired(backend: str) -> None:
    inputs = _inputs(1, 5, 1, 4, 2)
    leaves = [inputs[name].to(DEVICE).requires_grad_() for name in ("q", "k", "v")]
    norm = torch.ones(2, device=DEVICE)
    acts, _ids = sparse_topk_attention(*leaves, norm, top_k=2, scale=0.4, backend=backend)
    assert (acts == 0).any()
    d_acts = torch.where(acts > 0, 1.0, float("inf"))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(acts, leaves, d_acts))


def test_nan_ranks_as_in_the_reference() -> None:
    z = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    z[torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = float("nan")
    found = torch_select.select_top_k(z, torch.ones(30), top_k=7, select="relu")
    assert torch.equal(
        found[1], reference.select_top_k(z, torch.ones(30), top_k=7, select="relu")[1]
    )


def test_strided_inputs_are_accepted(backend: str) -> None:
    inputs = _inputs(2, 30, 4, 8, 2)
    turned = {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": inputs["k"].repeat(1, 1, 1, 2)[..., :8],
        "v": inputs["v"].transpose(0, 2).contiguous().transpose(0, 2),
        "W_O": inputs["W_O"].T.contiguous().T,
    }
    expected, found = (_run(t, backend, 3, {}) for t in (inputs, turned))
    errors = {name: _relative(found[name], expected[name]) for name in NAMES}
    assert max(errors.values()) < RTOL, errors


class _Sizes(TorchDispatchMode):
    """Notes the size of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.seen.append(tensor.numel())
        return out


def test_no_dense_activations_are_made_or_saved() -> None:
    """Of [tokens, n_ov_heads] there are v and dv; of [heads, seq, seq] there is nothing."""
    batch, seq, heads, group = 4, 300, 3, 200
    inputs = _inputs(batch, seq, heads, 8, group)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    v_size, one_sequence = leaves["v"].numel(), leaves["v"].numel() // batch
    assert one_sequence < heads * seq * seq
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with _Sizes() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        acts, ids = sparse_topk_attention(
            leaves["q"], leaves["k"], leaves["v"], torch.ones(heads * group), top_k=4, scale=0.4
        )
        y_hat = sparse_decode(acts, ids, leaves["W_O"])
    assert max(forward.seen) <= one_sequence
    assert [t.data_ptr() for t in saved if t.numel() > one_sequence] == [leaves["v"].data_ptr()]
    with _Sizes() as backward:
        torch.autograd.grad(y_hat.sum(), list(leaves.values()))
    assert [size for size in backward.seen if size > one_sequence] == [v_size]


@pytest.mark.parametrize(
    ("backend", "names"), [("torch", NAMES), ("reference", ("acts", "ids", "y_hat"))]
)
def test_autocast_outside_does_not_reach_in(backend: str, names: tuple[str, ...]) -> None:
    """In a bf16 autocast region float32 tensors gave bf16 products."""
    inputs = _inputs(1, 70, 2, 8, 3)
    expected = _run(inputs, backend, 3, {})
    with torch.autocast("cpu", torch.bfloat16):
        found = _run(inputs, backend, 3, {})
    assert all(torch.equal(found[name], expected[name]) for name in names)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.skipif(DEVICE == "cpu", reason="bfloat16 products need a GPU")
@pytest.mark.parametrize(("group", "heads"), [(1, 96), (16, 6), (128, 2)])
def test_bfloat16_gradients_on_a_gpu(group: int, heads: int) -> None:
    """Against the definition in float64; all heads kept, so that no choice hangs on rounding."""
    plain = _inputs(2, 257, heads, 64, group)
    plain["k"] += 2  # a common offset shows an error of D
    inputs = {name: t.bfloat16() for name, t in plain.items()}
    options = {"select": "abs"}
    expected = _run({n: t.double() for n, t in inputs.items()}, "reference", heads * group, options)
    found = _run(inputs, "triton", heads * group, options)
    errors = {name: _relative(found[name].double(), expected[name]) for name in NAMES}
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize("chunk", [2, 9, 40, 41])
def test_a_query_sees_its_own_chunk_alone(backend: str, chunk: int) -> None:
    inputs = _inputs(2, 40, 3, 8, 4)
    found = _run(inputs, backend, 12, {"chunk": chunk, "select": "abs"})
    chunks = [slice(start, start + chunk) for start in range(0, 40, chunk)]
    parts = []
    for rows in chunks:
        mine = {name: t if name == "W_O" else t[:, rows] for name, t in inputs.items()}
        parts.append(_run(mine, "reference", 12, {"select": "abs"})["acts"])
    assert _relative(found["acts"], torch.cat(parts, dim=1)) < RTOL
    weight = torch.linspace(-1, 1, 2 * 40 * 20).view(2, 40, 20).to(DEVICE)
    leaves = {name: t.clone().to(DEVICE).requires_grad_() for name, t in inputs.items()}
    by = SimpleNamespace(scale=0.4, softcap=None, window=None, chunk=chunk)
    z = reference.lorsa_attention(leaves["q"], leaves["k"], leaves["v"], by)
    (z @ leaves["W_O"] * weight).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert _relative(found[f"{name}.grad"], leaf.grad) < RTOL


def test_sinks_and_gates_have_the_gradients_of_the_definition(backend: str) -> None:
    """All heads kept, so that the definition differentiates without a choice."""
    options = {"sinks": True, "gate": True, "select": "abs"}
    inputs = _with_extras(_inputs(2, 40, 3, 8, 4), options)
    found = _run(inputs, backend, 12, options)
    leaves = {name: t.clone().to(DEVICE).requires_grad_() for name, t in inputs.items()}
    q, k, v, W_O, sinks, gate = leaves.values()
    z = reference.lorsa_attention(q, k, v, Score(0.4), sinks, gate)
    weight = torch.linspace(-1, 1, 2 * 40 * 20).view(2, 40, 20).to(DEVICE)
    (z @ W_O * weight).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert _relative(found[f"{name}.grad"], leaf.grad) < RTOL
    rows = reference.attention_pattern(q, k, Score(0.4), sinks=sinks).sum(-1)
    scores = 0.4 * torch.einsum("bthk,bshk->bhts", q, k)
    total = scores.masked_fill(torch.ones(40, 40).triu(1).bool().to(DEVICE), -1e9).exp().sum(-1)
    assert torch.allclose(rows, total / (total + sinks.exp()[:, None]), atol=1e-5)


def test_a_gate_of_zero_shuts_a_head(backend: str) -> None:
    inputs = _with_extras(_inputs(1, 20, 3, 8, 4), {"gate": True})
    inputs["gate"][..., ::2] = 0
    found = _run(inputs, backend, 12, {"gate": True, "select": "abs"})
    assert (found["acts"][..., ::2] == 0).all()
    assert all(value.isfinite().all() for name, value in found.items() if name.endswith("grad"))
