"""What is read off a model is what the model does: every family, against plain transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.harvest import (
    Capture,
    HarvestConfig,
    HarvestError,
    SelfCheck,
    attention_sites,
    check_geometry,
    harvest,
    read_geometry,
    read_weights,
)
from lorsa.harvest.selfcheck import require_passed
from lorsa.model import Rope, layer_attention
from lorsa.store import ActivationStore
from tiny import FAMILIES, N_CTX, make_model, make_tokenizer
from torch import Tensor

LAYERS = [0, 2]


def _tokens(n: int = 2) -> Tensor:
    return torch.randint(0, 400, (n, N_CTX), generator=torch.Generator().manual_seed(1))


def _plain_hooks(model: Any, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Catch x as the norm gives it and y as the layer adds it, with hooks of torch alone."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    decoder = model.gpt_neox if hasattr(model, "gpt_neox") else model.model
    handles = []
    for i, layer in enumerate(decoder.layers):
        module = getattr(layer, "self_attn", None) or layer.attention
        caught: dict[str, Tensor] = {}

        def on_norm(_m: Any, _a: Any, output: Tensor, caught: Any = caught) -> None:
            caught["x"] = output

        def on_attention(_m: Any, _a: Any, output: Any, caught: Any = caught, i: int = i) -> None:
            y = output[0] if isinstance(output, tuple) else output
            found[i] = (caught["x"], y)

        handles.append(layer.input_layernorm.register_forward_hook(on_norm))
        handles.append(module.register_forward_hook(on_attention))
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_sees_what_plain_hooks_see(family: str) -> None:
    model = make_model(family)
    expected = _plain_hooks(model, _tokens())
    with Capture(model, attention_sites(model, LAYERS)) as capture:
        found = capture.run(_tokens())
    assert sorted(found) == LAYERS
    for layer in LAYERS:
        for ours, theirs in zip(found[layer], expected[layer], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_y_is_recomputed_from_x(family: str) -> None:
    model = make_model(family)
    sites = attention_sites(model, LAYERS)
    with Capture(model, sites) as capture:
        found = capture.run(_tokens())
    for site in sites:
        x, y = found[site.layer]
        again = layer_attention(x, read_weights(model, site), read_geometry(model, site))
        assert (again - y).norm() / y.norm() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "neox-partial"])
def test_stored_activations_are_those_of_plain_hooks(
    family: str, dtype: str, tmp_path: Path, text_folder: Path
) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    harvest(
        HarvestConfig(
            model=str(tmp_path / "model"),
            layers="0,2",
            store=tmp_path / "acts",
            data=str(text_folder),
            n_ctx=N_CTX,
            tokens=10 * N_CTX,
            batch_size=3,
            dtype=dtype,
            device="cpu",
        )
    )
    store = ActivationStore.open(tmp_path / "acts")
    seqs = list(range(store.manifest.n_seq))
    expected = _plain_hooks(model, store.tokens(seqs).long())
    for layer in LAYERS:
        for stored, plain in zip(store.activations(layer, seqs), expected[layer], strict=True):
            assert torch.allclose(
                stored.float(),
                plain.to(stored.dtype).float(),
                rtol=2e-6 if dtype == "float32" else torch.finfo(stored.dtype).eps,
                atol=1e-6,
            )


def _check(model: Any, **changes: Any) -> SelfCheck:
    """Check one layer, as read or with a changed geometry."""
    site = attention_sites(model, [1])[0]
    with Capture(model, [site]) as capture:
        calls = capture.calls(_tokens())
    geometry = dataclasses.replace(read_geometry(model, site), **changes)
    weights = read_weights(model, site)
    return check_geometry(model, [site], calls, {1: weights}, {1: geometry})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_passes_in_any_precision(family: str, dtype: torch.dtype) -> None:
    """It once compared with the model's own half-precision output, which is off by a percent."""
    check = _check(make_model(family).to(dtype))
    assert check.layers[1].error < 1e-5
    assert check.limit == 1e-4
    assert check.passed(1)
    assert (check.layers[1].noise < 1e-5) == (dtype == torch.float32)


def test_the_self_check_bears_large_biases_in_half_precision() -> None:
    """As Qwen 2 has them in its keys."""
    model = make_model("qwen2")
    for projection in ("q_proj", "k_proj"):
        getattr(model.model.layers[1].self_attn, projection).bias.data.mul_(50)
    assert _check(model.to(torch.bfloat16)).layers[1].error < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 0.3},
        {"window": 4},
        {"softcap": 1.0},
        {"rope": None},
        {"rope": Rope(inv_freq=(1.0, 0.1, 0.01, 0.002))},
        {"rope": Rope(inv_freq=(1.0, 0.1, 0.01, 0.001), interleaved=True)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_self_check_finds_a_wrong_geometry(changes: dict[str, Any], dtype: torch.dtype) -> None:
    check = _check(make_model("llama-gqa").to(dtype), **changes)
    assert check.layers[1].error > 1e-3
    with pytest.raises(HarvestError, match=r"layer 1: .* differs by .*--no-selfcheck"):
        require_passed(check)


def test_the_self_check_says_when_activations_are_not_finite() -> None:
    model = make_model("llama-gqa")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(HarvestError, match="layer 1: its activations are not finite"):
        _check(model)


def test_nothing_after_the_last_layer_is_computed() -> None:
    model = make_model("llama-gqa")
    ran: list[str] = []
    model.model.layers[2].register_forward_hook(lambda *_: ran.append("layer 2"))
    model.lm_head.register_forward_hook(lambda *_: ran.append("logits"))
    with Capture(model, attention_sites(model, [0, 1])) as capture:
        capture.run(_tokens())
    assert ran == []


def test_a_layer_outside_the_model_is_named() -> None:
    with pytest.raises(HarvestError, match="layer 3 is outside the model; it has 0-2"):
        attention_sites(make_model("llama-gqa"), [0, 3])


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = make_model("llama-gqa")
    sites = attention_sites(model, [0, 1])
    with pytest.raises(IndexError), Capture(model, sites) as capture:
        capture.run(torch.full((1, 4), 10_000))
    assert not any(site.module._forward_hooks for site in sites)


def test_geometry_is_read_not_assumed() -> None:
    def geometry(family: str) -> Any:
        model = make_model(family)
        with Capture(model, attention_sites(model, [2])) as capture:
            capture.run(_tokens())
        return read_geometry(model, attention_sites(model, [2])[0])

    assert len(geometry("neox-partial").rope.inv_freq) == 1
    assert geometry("llama-yarn-rope").rope.attention_scaling > 1
    assert geometry("mistral-window").window == 7
    assert geometry("qwen2-window").window == 5
    assert geometry("qwen2").window is None
    assert geometry("qwen3").qk_norm.eps == 1e-6
    assert geometry("llama-wide-heads").d_head == 16
    assert geometry("llama-mqa-bias").n_kv_heads == 1
