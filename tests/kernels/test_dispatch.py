"""Wrong tensors and options end in one ValueError that names them."""

import sys
from typing import Any

import pytest
import torch
from lorsa.kernels import dispatch, torch_path
from lorsa.kernels.dispatch import choose_path, sparse_decode, sparse_topk_attention
from lorsa.kernels.selfcheck import AttentionKind, DecodeKind
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _call(**changes: Any) -> Any:
    torch.manual_seed(0)
    tensors = {
        "q": torch.randn(2, 5, 3, 4),
        "k": torch.randn(2, 5, 3, 4),
        "v": torch.randn(2, 5, 6),
        "w_o_norm": torch.ones(6),
    }
    settings: dict[str, Any] = {"top_k": 2, "scale": 0.5}
    for name, value in changes.items():
        (tensors if name in tensors else settings)[name] = value
    return sparse_topk_attention(**tensors, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 4, 3, 4)}, r"k is \[2, 4, 3, 4\]"),
        ({"v": torch.randn(2, 4, 6)}, r"v must be \[2, 5, n_ov_heads\]"),
        ({"v": torch.randn(2, 5, 7)}, "7 OV heads, q has 3 QK heads"),
        ({"w_o_norm": torch.ones(5)}, r"w_o_norm must be \[6\]"),
        ({"v": torch.randn(2, 5, 6).double()}, "v is torch.float64"),
        ({"w_o_norm": torch.ones(6, device="meta")}, "one device"),
        ({"top_k": 7}, "top_k is 7; allowed: 1..6"),
        ({"top_k": 0}, "top_k is 0"),
        ({"select": "max"}, "allowed: relu, abs"),
        ({"window": 0}, "window is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[3\], floating"),
        ({"gate": torch.zeros(1, 4, 3)}, r"gate must be \["),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"backend": "cuda"}, "allowed: auto, torch"),
    ],
)
def test_sparse_topk_attention_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_sparse_topk_attention_refuses_an_empty_batch() -> None:
    empty = torch.randn(0, 5, 3, 4)
    with pytest.raises(ValueError, match="empty"):
        _call(q=empty, k=empty, v=torch.randn(0, 5, 6))


@pytest.mark.parametrize(
    ("acts", "ids", "W_O", "message"),
    [
        ((2, 5, 3), (2, 5, 2), (6, 4), "acts and ids"),
        ((2, 5, 3), (2, 5, 3), (6,), r"W_O must be \[n_features, width\]"),
    ],
)
def test_sparse_decode_names_what_is_wrong(acts: Any, ids: Any, W_O: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_decode(torch.randn(acts), torch.zeros(ids, dtype=torch.int32), torch.randn(W_O))


@pytest.mark.parametrize("ids", [torch.zeros(1, 1, 1), torch.zeros(1, 0, 1, dtype=torch.int64)])
def test_sparse_decode_refuses_ids_that_are_none(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="ids must be integers and some"):
        sparse_decode(torch.randn(ids.shape), ids, torch.randn(3, 4))


def test_sparse_decode_refuses_mixed_dtypes() -> None:
    ids = torch.zeros(1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="share dtype"):
        sparse_decode(torch.randn(1, 1, 1), ids, torch.randn(3, 4).double())


def test_triton_by_name_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' cannot run here: the tensors are on cpu"):
        choose_path.__wrapped__("triton", "cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"triton cannot be imported .*; use 'torch'"):
        choose_path.__wrapped__("triton", "cuda")


@pytest.mark.triton
def test_triton_takes_no_float64() -> None:
    pytest.importorskip("triton")
    double = {name: torch.randn(1, 3, 2, 4).double() for name in ("q", "k")}
    with pytest.raises(ValueError, match="takes float32, bfloat16 and float16, not torch.float64"):
        _call(**double, v=torch.randn(1, 3, 6).double(), backend="triton")


def test_auto_takes_torch_on_a_cpu() -> None:
    assert choose_path("auto", "cpu") is torch_path
    acts, ids = _call()
    again, ids_again = _call(backend="torch")
    assert torch.equal(acts, again)
    assert torch.equal(ids, ids_again)


@pytest.mark.triton
def test_auto_takes_triton_on_a_gpu() -> None:
    pytest.importorskip("triton")
    assert choose_path.__wrapped__("auto", "cuda").__name__.endswith("triton_path")


def test_auto_takes_torch_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choose_path.__wrapped__("auto", "cuda") is torch_path


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `auto` reach for Triton on this machine; return the Triton path."""
    pytest.importorskip("triton")
    triton_path = choose_path("triton", DEVICE)
    by_name = {"auto": triton_path, "triton": triton_path, "torch": torch_path}
    monkeypatch.setattr(dispatch, "choose_path", lambda backend, _device: by_name[backend])
    dispatch._path_for.cache_clear()
    yield triton_path
    dispatch._path_for.cache_clear()


@pytest.mark.triton
def test_auto_checks_triton_once_for_every_kind(
    as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fine(path: Any, kind: Any) -> None:
        assert path is as_on_a_gpu
        asked.append(kind)

    monkeypatch.setattr(dispatch, "why_not_triton", fine)
    decode = DecodeKind(torch.device(DEVICE), torch.float32)
    assert dispatch._path_for("auto", decode) is as_on_a_gpu
    for _ in range(2):
        acts, ids = _call()
        sparse_decode(acts, ids, torch.randn(6, 4))
    _call(select="abs")
    assert [type(kind) for kind in asked] == [DecodeKind, AttentionKind, AttentionKind]
    assert asked[1] == AttentionKind(
        torch.device(DEVICE), torch.float32, 4, 2, 6, select="relu", window=False, softcap=False
    )


@pytest.mark.triton
def test_auto_leaves_triton_where_it_is_wrong(
    as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _call(backend="torch")
    monkeypatch.setattr(dispatch, "why_not_triton", lambda path, kind: "its dq is 0.3 off")
    for _ in range(2):
        assert torch.equal(_call()[0], expected[0])
    assert caplog.text.count("top-k attention is not used on") == 1
    assert "its dq is 0.3 off; the torch path takes its place" in caplog.text


@pytest.mark.triton
def test_auto_takes_torch_for_float64(as_on_a_gpu: Any) -> None:
    double = {name: torch.randn(1, 3, 2, 4).double() for name in ("q", "k")}
    acts, _ids = _call(**double, v=torch.randn(1, 3, 6).double())
    assert acts.dtype == torch.float64
