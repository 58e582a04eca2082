"""Changes at the sites of models that run, against the same done by hand."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from lorsa.errors import AttachError
from lorsa.language.blocks import find_blocks
from lorsa.language.edit import Gap, edited, gaps, replaced
from lorsa.sites import SITE_NAMES, Site, ports_between
from tiny import FAMILIES, make_model, some_tokens
from torch import Tensor, nn

SOME = ["llama-gqa", "neox-partial", "gpt2", "gemma3-multimodal", "olmo2", "opt", "qwen2-moe"]


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _at(model: Any, *sites: Site) -> list[Gap]:
    return gaps(model, [ports_between(site.layer, site.name, site.name) for site in sites])


@pytest.mark.parametrize("family", SOME)
def test_what_is_put_back_changes_no_bit_and_zeros_do(family: str) -> None:
    model, tokens = make_model(family), some_tokens()
    before = _logits(model, tokens)
    for name in find_blocks(model)[1].spots:
        (gap,) = _at(model, Site(1, name))
        seen: list[Tensor] = []

        def same(x: Tensor, y: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return y.clone()

        with edited(gap, same):
            assert torch.equal(_logits(model, tokens), before), name
        assert [x.ndim for x in seen] == [3]
        with replaced(gap, torch.zeros_like):
            assert not torch.allclose(_logits(model, tokens), before, atol=1e-3), name
        assert torch.equal(_logits(model, tokens), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["resid_in", "resid_mid", "resid_out"])
def test_nothing_passes_a_stream_that_is_replaced(family: str, name: str) -> None:
    """What the text is does not show in the logits, so no path leads around the site."""
    model = make_model(family)
    if name not in find_blocks(model)[1].spots:
        pytest.skip("its attention and its MLP read the same stream")
    (gap,) = _at(model, Site(1, name))
    stream = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    with replaced(gap, lambda x: stream.view(x.shape)):
        one, other = (_logits(model, some_tokens(seed=seed)) for seed in (1, 2))
    assert torch.allclose(one, other, atol=1e-6)
    assert not torch.allclose(one, _logits(model, some_tokens(seed=1)), atol=1e-2)


def _by_hand(model: Any, name: str, new: Callable[[Tensor], Tensor]) -> Any:
    """Return the handles of hooks that do to layer 1 of a Llama what a stand-in does."""
    block = model.model.layers[1]

    def give(module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _m, _a, y: new(y))

    match name:
        case "mlp_out":
            return give(block.mlp)
        case "mlp_in":
            return block.mlp.register_forward_pre_hook(lambda _m, args: (new(args[0]),))
        case "resid_out":
            return model.model.layers[2].register_forward_pre_hook(lambda _m, a: (new(a[0]),))
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["mlp_in", "mlp_out", "resid_out"])
def test_a_stand_in_is_a_hook_written_by_hand(name: str) -> None:
    model, tokens = make_model("llama-gqa"), some_tokens()
    handle = _by_hand(model, name, lambda x: 2 * x + 0.1)
    expected = _logits(model, tokens)
    handle.remove()
    with replaced(_at(model, Site(1, name))[0], lambda x: 2 * x + 0.1):
        assert torch.equal(_logits(model, tokens), expected)


@pytest.mark.parametrize("family", SOME)
def test_one_site_is_read_and_another_written(family: str) -> None:
    """An MLP is replaced by a map of its input, found by hooks of its own."""
    model, tokens = make_model(family), some_tokens()
    into, out = _at(model, Site(1, "mlp_in"), Site(1, "mlp_out"))
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(edited(into, lambda x, _y: seen.setdefault("x", x.clone())))
        _logits(model, tokens)
    with replaced(out, lambda y: (3 * seen["x"]).view(y.shape)):
        expected = _logits(model, tokens)
    (gap,) = gaps(model, [ports_between(1, "mlp_in", "mlp_out")])
    with replaced(gap, lambda x: 3 * x):
        assert torch.equal(_logits(model, tokens), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_gradient_passes_every_site() -> None:
    model, tokens = make_model("llama-gqa"), some_tokens()
    for name in SITE_NAMES:
        factor = torch.ones((), requires_grad=True)
        with replaced(_at(model, Site(1, name))[0], lambda x, factor=factor: x * x * factor):
            model(input_ids=tokens, use_cache=False, labels=tokens).loss.backward()
        assert factor.grad is not None, name


def test_what_a_model_lacks_is_named() -> None:
    model = make_model("neox-partial")
    with pytest.raises(AttachError, match=r"layer 3 is outside the model; it has 0-2"):
        _at(model, Site(3, "mlp_out"))
    with pytest.raises(
        AttachError, match=r"layer 1 has none: .*, so there is no site 1\.resid_mid"
    ):
        _at(model, Site(1, "resid_mid"))
    assert [gap.depth for gap in _at(model, Site(1, "mlp_in"), Site(1, "resid_in"))] == [
        (1, 4),
        (1, 0),
    ]
