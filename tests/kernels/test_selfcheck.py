"""The check of the Triton path finds it right here, and finds what is made wrong."""

from typing import Any

import pytest
import torch
from lorsa.kernels.dispatch import choose_path
from lorsa.kernels.selfcheck import AttentionKind, DecodeKind, why_not_triton

pytestmark = pytest.mark.triton
pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (
    [torch.float32, torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32]
)


def _attention(dtype: torch.dtype = torch.float32, **changes: Any) -> AttentionKind:
    kind = AttentionKind(
        DEVICE,
        dtype,
        d_qk_head=12,
        group=3,
        n_ov_heads=60,
        select="relu",
        window=False,
        softcap=False,
    )
    return kind._replace(**changes)


@pytest.fixture
def path() -> Any:
    """The Triton path, as a module."""
    return choose_path("triton", DEVICE.type)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"window": True, "softcap": True, "group": 1}, {"sinks": True, "gate": True}]
)
def test_attention_agrees_here(path: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert why_not_triton(path, _attention(dtype, **options)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_agrees_here(path: Any, dtype: torch.dtype) -> None:
    assert why_not_triton(path, DecodeKind(DEVICE, dtype)) is None


def test_it_works_in_inference_mode_and_autocast(path: Any) -> None:
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
        assert why_not_triton(path, _attention()) is None


def test_a_wrong_gradient_is_named(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = "lorsa.kernels.triton_attention._any_in_run"
    monkeypatch.setattr(silent, lambda fired, first: torch.zeros_like(first))
    reason = why_not_triton(path, _attention())
    assert reason is not None
    assert reason.startswith("its dq is ")


def test_nan_is_wrong(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(acts: torch.Tensor, ids: torch.Tensor, W_O: torch.Tensor) -> torch.Tensor:
        return acts.sum() * W_O[:1].expand(acts.shape[1], -1)[None] * float("nan")

    monkeypatch.setattr(path, "sparse_decode", nothing)
    assert why_not_triton(path, DecodeKind(DEVICE, torch.float32)) == (
        "its y_hat is nan off, relative to the definition"
    )


def test_another_choice_of_heads_is_wrong(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = path.select_top_k

    def last_ties(z: torch.Tensor, norm: torch.Tensor, **options: Any) -> Any:
        acts, ids = right(z.flip(1), norm.flip(0), **options)
        return acts.flip(1), z.shape[1] - 1 - ids.flip(1)

    monkeypatch.setattr(path, "select_top_k", last_ties)
    kind = _attention(n_ov_heads=3000)
    assert why_not_triton(path, kind) == "it keeps other features than the definition"


def test_an_error_of_the_compiler_is_a_reason(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(path, "sparse_decode", fail)
    assert why_not_triton(path, DecodeKind(DEVICE, torch.float32)) == (
        "it raised RuntimeError: out of resource: shared memory"
    )
