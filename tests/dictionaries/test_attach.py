"""Dictionaries in place of what they stand in for, in models that run."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from lorsa.dictionaries.linear_config import SaeConfig, TranscoderConfig
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.sae import Sae
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.errors import AttachError
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.edit import edited, gaps, replaced
from lorsa.sites import SITE_NAMES, ports_between
from tiny import make_model, some_tokens
from torch import Tensor

LAYER = 1
FAMILIES = ["llama-gqa", "neox-partial", "gpt2", "gemma3-multimodal"]


def _lorsa(layer: int | None = LAYER, seed: int = 0, **settings: Any) -> Lorsa:
    config: dict[str, Any] = {"d_model": 32, "n_qk_heads": 2, "d_qk_head": 8, "n_ov_heads": 40}
    lorsa = Lorsa(LorsaConfig(**{**config, "top_k": 6, "scale": 0.3, "layer": layer, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return lorsa


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _y_hat(model: Any, lorsa: Lorsa, layer: int, tokens: Tensor) -> Tensor:
    with Capture(model, attention_sites(model, [layer])) as capture, torch.no_grad():
        y_hat: Tensor = lorsa(capture.calls(tokens)[layer].x.float())
    return y_hat


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_puts_y_hat_in_place_of_y(family: str) -> None:
    model, lorsa, tokens = make_model(family), _lorsa(), some_tokens()
    before = _logits(model, tokens)
    y_hat = _y_hat(model, lorsa, LAYER, tokens)
    with replaced(attention_sites(model, [LAYER])[0], lambda _x: y_hat):
        expected = _logits(model, tokens)
    with lorsa.attach(model):
        found = _logits(model, tokens)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(_logits(model, tokens), before)


def test_another_layer_than_the_configs_can_be_given() -> None:
    model, tokens = make_model("llama-gqa"), some_tokens()
    with _lorsa(layer=2).attach(model):
        expected = _logits(model, tokens)
    for layer in (None, 1):
        with _lorsa(layer=layer).attach(model, 2):
            assert torch.equal(_logits(model, tokens), expected)
    with _lorsa(layer=2).attach(model, 0):  # which is not taken for none
        assert not torch.allclose(_logits(model, tokens), expected, atol=1e-2)


def test_several_layers_are_replaced_by_blocks_within_blocks() -> None:
    model, tokens = make_model("llama-gqa"), some_tokens()
    low, high = _lorsa(layer=0, seed=1), _lorsa(layer=2, seed=2)
    before = _logits(model, tokens)
    with low.attach(model):
        y_hat = _y_hat(model, high, 2, tokens)  # of what the lower one makes
        with replaced(attention_sites(model, [2])[0], lambda _x: y_hat):
            expected = _logits(model, tokens)
        with high.attach(model):
            assert torch.allclose(_logits(model, tokens), expected, atol=1e-5)
        one = _logits(model, tokens)
        assert not torch.allclose(one, expected, atol=1e-2)
    with low.attach(model):
        assert torch.equal(_logits(model, tokens), one)
    assert torch.equal(_logits(model, tokens), before)


def test_a_model_in_half_precision_keeps_its_dtype() -> None:
    model, lorsa, tokens = make_model("llama-gqa").bfloat16(), _lorsa(), some_tokens()
    y_hat = _y_hat(model, lorsa, LAYER, tokens)
    with replaced(attention_sites(model, [LAYER])[0], lambda _x: y_hat):
        expected = _logits(model, tokens)
    with lorsa.attach(model):
        found = _logits(model, tokens)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_a_gradient_reaches_the_lorsa_and_what_is_before_it() -> None:
    model, lorsa, tokens = make_model("llama-gqa"), _lorsa(), some_tokens()
    with lorsa.attach(model):
        model(input_ids=tokens, use_cache=False, labels=tokens).loss.backward()
    assert lorsa.W_O.grad is not None
    assert lorsa.W_O.grad.any()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()
    assert model.model.layers[1].self_attn.o_proj.weight.grad is None  # it counts for nothing


def test_tokens_after_the_text_change_nothing_before_them() -> None:
    """Padding on the right, which the Lorsa does not know of, is not seen from the left."""
    model, lorsa = make_model("llama-gqa"), _lorsa()
    tokens = some_tokens(1)
    mask = torch.ones_like(tokens)
    mask[:, 20:] = 0
    with lorsa.attach(model):
        whole = _logits(model, tokens[:, :20])
        with torch.no_grad():
            padded = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(padded[:, :20], whole, atol=1e-4)


@pytest.mark.parametrize(
    ("lorsa", "layer", "message"),
    [
        (_lorsa(layer=None), None, "the Lorsa does not say at which layer it lies; give layer="),
        (_lorsa(), 3, "layer 3 is outside the model; it has 0-2"),
        (_lorsa(layer=9), None, "layer 9 is outside the model; it has 0-2"),
        (_lorsa(d_model=16), None, r"d_model 16\); the model given has d_model 32"),
        (_lorsa(hook_in="blocks.1.hook_in"), None, "reads blocks.1.hook_in, not the layer's input"),
    ],
    ids=["no layer", "outside", "config outside", "width", "hook"],
)
def test_what_does_not_fit_is_refused_before_the_model_runs(
    lorsa: Lorsa, layer: int | None, message: str
) -> None:
    model = make_model("llama-gqa")
    with pytest.raises(AttachError, match=message), lorsa.attach(model, layer):
        pytest.fail("it was attached")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_lorsa_on_another_device_is_named() -> None:
    """Torch says of it that two tensors were expected to be on the same device."""
    model, lorsa = make_model("llama-gqa"), _lorsa().to("meta")
    with lorsa.attach(model), pytest.raises(AttachError, match=r"move it: lorsa\.to\('cpu'\)"):
        _logits(model, some_tokens())


def test_replaced_is_undone() -> None:
    model = make_model("neox-partial")
    site = attention_sites(model, [1])[0]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        with pytest.raises(ZeroDivisionError), replaced(site, torch.zeros_like):
            assert not torch.equal(model(input_ids=tokens).logits, before)
            raise ZeroDivisionError
        assert torch.equal(model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("family", ["llama-gqa", "neox-partial", "gpt2", "gemma2"])
def test_a_call_that_goes_on_from_a_cache_is_refused(family: str) -> None:
    """A Lorsa would see the new token alone, and give something else without a word."""
    model = make_model(family)
    (site,) = attention_sites(model, [1])
    tokens = some_tokens(1)[:, :6]
    with replaced(site, torch.zeros_like):
        whole = model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False)
        assert whole.shape == (1, 9)
        with pytest.raises(AttachError, match="generate with use_cache=False"):
            model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=True)


def _linear(site: str | None, seed: int = 0, **settings: Any) -> Sae | Transcoder:
    """Return an SAE of a site, or a transcoder for None, of layer 1."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"d_model": 32, "n_features": 40, "top_k": 6, "layer": LAYER}
    made: Sae | Transcoder
    if site is None:
        made = Transcoder(TranscoderConfig(**shape | settings))
    else:
        made = Sae(SaeConfig(site=site, **shape | settings))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def _seen(model: Any, tokens: Tensor, *names: str) -> list[Tensor]:
    """Return the activations at sites of layer 1, with whatever is attached."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for gap in gaps(model, [ports_between(LAYER, name, name) for name in names]):

            def see(x: Tensor, y: Tensor, name: str = gap.reads.site.name) -> Tensor:
                found[name] = x.clone()
                return y

            hooks.enter_context(edited(gap, see))
        model(input_ids=tokens, use_cache=False)
    return [found[name] for name in names]


@pytest.mark.parametrize("site", [name for name in SITE_NAMES if name != "resid_mid"])
@pytest.mark.parametrize("family", ["llama-gqa", "neox-partial", "gpt2"])
def test_an_sae_reads_its_site_and_writes_it(family: str, site: str) -> None:
    model, sae, tokens = make_model(family), _linear(site), some_tokens()
    before = _logits(model, tokens)
    (x,) = _seen(model, tokens, site)
    with sae.attach(model):
        (found,) = _seen(model, tokens, site)
        assert not torch.allclose(_logits(model, tokens), before, atol=1e-2)
    torch.testing.assert_close(found, sae(x))
    assert torch.equal(_logits(model, tokens), before)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_what_is_put_between_attention_and_mlp_goes_on_beside_the_mlp(family: str) -> None:
    """The MLP's norm reads the residual stream, and the sum after it does too."""
    model, sae, tokens = make_model(family), _linear("resid_mid"), some_tokens()
    with sae.attach(model):
        mid, mlp, out = _seen(model, tokens, "resid_mid", "mlp_out", "resid_out")
    torch.testing.assert_close(out, mid + mlp)
    (x,) = _seen(model, tokens, "resid_mid")
    torch.testing.assert_close(mid, sae(x))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "neox-partial", "gpt2"])
def test_a_transcoder_stands_in_for_the_mlp(family: str, skip: bool) -> None:
    model, transcoder, tokens = make_model(family), _linear(None, skip=skip), some_tokens()
    (x,) = _seen(model, tokens, "mlp_in")
    with transcoder.attach(model):
        (found,) = _seen(model, tokens, "mlp_out")
    torch.testing.assert_close(found, transcoder(x))


def test_kinds_stand_in_one_layer_together() -> None:
    model, tokens = make_model("llama-gqa"), some_tokens()
    before = _logits(model, tokens)
    lorsa, transcoder, sae = _lorsa(), _linear(None), _linear("resid_out", seed=1)
    with lorsa.attach(model), transcoder.attach(model), sae.attach(model):
        names = ("attn_in", "attn_out", "resid_in", "resid_mid", "mlp_in", "mlp_out", "resid_out")
        found = dict(zip(names, _seen(model, tokens, *names), strict=True))
    torch.testing.assert_close(found["attn_out"], lorsa(found["attn_in"]))
    torch.testing.assert_close(found["resid_mid"], found["resid_in"] + found["attn_out"])
    torch.testing.assert_close(found["mlp_out"], transcoder(found["mlp_in"]))
    torch.testing.assert_close(found["resid_out"], sae(found["resid_mid"] + found["mlp_out"]))
    assert torch.equal(_logits(model, tokens), before)


def test_the_residual_stream_between_may_be_changed_after_the_output() -> None:
    """Whichever was attached first, the output is what an SAE of it makes of the changed stream."""
    model, tokens = make_model("llama-gqa"), some_tokens()
    mid, out = _linear("resid_mid"), _linear("resid_out", seed=1)
    with out.attach(model), mid.attach(model):
        expected = _logits(model, tokens)
    with mid.attach(model), out.attach(model):
        assert torch.equal(_logits(model, tokens), expected)


def test_an_sae_goes_on_from_a_cache() -> None:
    """Its features depend on one token alone."""
    model, tokens = make_model("llama-gqa"), some_tokens()
    with _linear("resid_out").attach(model), torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        first = model(input_ids=tokens[:, :4], use_cache=True)
        rest = model(input_ids=tokens[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 4:], atol=1e-4, rtol=1e-4)


def test_a_site_that_a_family_has_not_is_refused() -> None:
    model = make_model("neox-partial")
    message = r"1\.resid_mid is no site of this model: layer 1 has none: attention and MLP read"
    with pytest.raises(AttachError, match=message), _linear("resid_mid").attach(model):
        pass
