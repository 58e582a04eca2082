"""Changes of single heads in the live model, against the same done by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from lorsa.circuits.intervene import activations_of, intervene
from lorsa.dictionaries.linear_config import TranscoderConfig
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.errors import AnalyzeError, AttachError
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.edit import replaced
from tiny import make_model, some_tokens
from torch import Tensor

LAYER = 1
FAMILIES = ["llama-gqa", "neox-partial", "gpt2"]


def make_lorsa(activation: str = "topk", d_model: int = 32) -> Lorsa:
    sizes = {"n_qk_heads": 2, "d_qk_head": 8, "n_ov_heads": 40, "top_k": 6, "layer": LAYER}
    lorsa = Lorsa(LorsaConfig(d_model=d_model, scale=0.3, activation=activation, **sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_(std=0.3, generator=generator)
    lorsa.set_threshold(torch.randn(2, 32, d_model, generator=generator))
    return lorsa


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _firing(model: Any, lorsa: Lorsa, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's x and y, and a dense z, [n, seq, n_ov_heads]."""
    with Capture(model, attention_sites(model, [LAYER])) as capture, torch.no_grad():
        call = capture.calls(tokens)[LAYER]
        x, y = call.x, call.y
        acts, ids = lorsa.encode(x)
    z = torch.zeros(*acts.shape[:2], lorsa.config.n_ov_heads)
    return x, y, z.scatter_add(2, ids.long(), acts)


def _busy(z: Tensor, n: int = 3) -> list[int]:
    """Return the heads that fire most."""
    return (z != 0).sum(dim=(0, 1)).topk(n).indices.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_factor_of_one_changes_no_bit(family: str) -> None:
    model, lorsa, tokens = make_model(family), make_lorsa(), some_tokens()
    before = _logits(model, tokens)
    _x, _y, z = _firing(model, lorsa, tokens)
    with intervene(model, lorsa, LAYER, dict.fromkeys(_busy(z), 1.0)):
        assert torch.equal(_logits(model, tokens), before)
    with intervene(model, lorsa, LAYER, {}):
        assert torch.equal(_logits(model, tokens), before)
    with intervene(model, lorsa, LAYER, {_busy(z)[0]: 0.0}):
        assert not torch.equal(_logits(model, tokens), before)
    assert torch.equal(_logits(model, tokens), before)


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_a_dictionary_in_half_precision_is_changed_as_well(error: str) -> None:
    """It ended in an error of torch: the changes are fp32, and what features write was not."""
    model, lorsa, tokens = make_model("llama-gqa"), make_lorsa(), some_tokens()
    _x, _y, z = _firing(model, lorsa, tokens)
    changes = {_busy(z)[0]: 0.0}
    with intervene(model, lorsa, LAYER, changes, error=error):
        whole = _logits(model, tokens)
    with intervene(model, lorsa.to(torch.bfloat16), LAYER, changes, error=error):
        half = _logits(model, tokens)
    assert 0 < float((half - whole).norm() / whole.norm()) < 0.1


def test_a_factor_of_one_changes_no_bit_in_half_precision() -> None:
    model, lorsa, tokens = make_model("llama-gqa").bfloat16(), make_lorsa(), some_tokens()
    before = _logits(model, tokens)
    with intervene(model, lorsa, LAYER, dict.fromkeys(range(40), 1.0)):
        assert torch.equal(_logits(model, tokens), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_without_changes_is_the_lorsa_in_place(family: str) -> None:
    model, lorsa, tokens = make_model(family), make_lorsa(), some_tokens()
    (site,) = attention_sites(model, [LAYER])
    with replaced(site, lorsa):
        expected = _logits(model, tokens)
    with intervene(model, lorsa, LAYER, {3: 1.0}, error="drop"):
        assert torch.equal(_logits(model, tokens), expected)


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_scaling_is_what_it_is_by_hand(activation: str, error: str) -> None:
    """Against y or y_hat plus (factor - 1) z w_O of a dense z."""
    model, lorsa, tokens = make_model("llama-gqa"), make_lorsa(activation), some_tokens()
    (site,) = attention_sites(model, [LAYER])
    x, y, z = _firing(model, lorsa, tokens)
    a, b, c = _busy(z)
    silent = int((z != 0).sum(dim=(0, 1)).argmin())
    factors = torch.ones(lorsa.config.n_ov_heads)
    factors[[a, b, c, silent]] = torch.tensor([0.0, 2.5, -1.0, 9.0])
    with torch.no_grad():
        base = y if error == "keep" else lorsa(x)
        new = base + (z * (factors - 1)) @ lorsa.W_O
    with replaced(site, lambda _x: new):
        expected = _logits(model, tokens)
    changes = {c: -1.0, a: 0.0, silent: 9.0, b: 2.5}
    with intervene(model, lorsa, LAYER, changes, error=error):
        assert torch.allclose(_logits(model, tokens), expected, atol=1e-4)


def test_ablating_all_that_fires_leaves_the_bias() -> None:
    model, lorsa, tokens = make_model("llama-gqa"), make_lorsa(), some_tokens()
    (site,) = attention_sites(model, [LAYER])
    with replaced(site, lambda x: lorsa.b_O.expand_as(x)):
        expected = _logits(model, tokens)
    with intervene(model, lorsa, LAYER, dict.fromkeys(range(40), 0.0), error="drop"):
        assert torch.allclose(_logits(model, tokens), expected, atol=1e-4)


def test_a_value_is_set_at_every_token() -> None:
    """Also where the head does not fire."""
    model, lorsa, tokens = make_model("llama-gqa"), make_lorsa(), some_tokens()
    (site,) = attention_sites(model, [LAYER])
    _x, y, z = _firing(model, lorsa, tokens)
    (head,) = _busy(z, 1)
    assert (z[..., head] == 0).any()
    with torch.no_grad():
        new = y + (1.5 - z[..., head, None]) * lorsa.W_O[head]
    with replaced(site, lambda _x: new):
        expected = _logits(model, tokens)
    with intervene(model, lorsa, LAYER, {head: 1.5}, how="set"):
        assert torch.allclose(_logits(model, tokens), expected, atol=1e-4)


def test_activations_are_in_the_order_of_the_heads() -> None:
    model, lorsa, tokens = make_model("llama-gqa"), make_lorsa(), some_tokens()
    x, _y, z = _firing(model, lorsa, tokens)
    heads = torch.tensor([_busy(z)[2], _busy(z)[0], 39])
    with torch.no_grad():
        found = activations_of(lorsa.encode(x), heads, lorsa.config.n_ov_heads)
    assert torch.equal(found, z[..., heads])


def test_what_cannot_be_changed_is_refused() -> None:
    model, lorsa = make_model("llama-gqa"), make_lorsa()

    def enter(lorsa: Lorsa, layer: int, changes: dict[int, float], **settings: Any) -> None:
        with intervene(model, lorsa, layer, changes, **settings):
            pass

    for head in (40, -1):
        with pytest.raises(AnalyzeError, match=rf"head {head} is outside the Lorsa; it has 0-39"):
            enter(lorsa, LAYER, {head: 0.0})
    with pytest.raises(AttachError, match=r"d_model 16\); the model given has d_model 32"):
        enter(make_lorsa(d_model=16), LAYER, {})
    foreign = make_lorsa()
    foreign.config = replace(foreign.config, hook_in="blocks.1.ln1.hook_normalized")
    with pytest.raises(AttachError, match=r"reads blocks.1.ln1.hook_normalized, not the layer's"):
        enter(foreign, LAYER, {})
    with pytest.raises(AttachError, match="layer 9 is outside the model"):
        enter(lorsa, 9, {})
    with pytest.raises(ValueError, match="'keep', 'drop'|keep, drop"):
        enter(lorsa, LAYER, {}, error="lose")
    with pytest.raises(ValueError, match="scale, set"):
        enter(lorsa, LAYER, {}, how="add")


def _transcoder(**settings: Any) -> Transcoder:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 32, "n_features": 40, "top_k": 6, "layer": LAYER}
    transcoder = Transcoder(TranscoderConfig(**shape | settings))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_(std=0.3)
    return transcoder


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("skip", [False, True])
def test_features_of_a_transcoder_are_changed_like_heads(skip: bool, error: str) -> None:
    """Against hooks of plain torch on the MLP."""
    model, tokens, transcoder = make_model("llama-gqa"), some_tokens(), _transcoder(skip=skip)
    before = _logits(model, tokens)

    def by_hand(_module: Any, args: Any, y: Tensor) -> Tensor:
        acts, ids = transcoder.encode(args[0])
        z = torch.zeros(*acts.shape[:2], 40).scatter_add(2, ids.long(), acts)
        factors = torch.ones(40)
        factors[[3, 7]] = torch.tensor([0.0, 2.0])
        base = y if error == "keep" else transcoder(args[0])
        return base + (z * (factors - 1)) @ transcoder.W_O

    handle = model.model.layers[LAYER].mlp.register_forward_hook(by_hand)
    expected = _logits(model, tokens)
    handle.remove()
    with intervene(model, transcoder, LAYER, {3: 0.0, 7: 2.0}, error=error):
        assert torch.allclose(_logits(model, tokens), expected, atol=1e-4)
    with intervene(model, transcoder, LAYER, {3: 1.0}):
        assert torch.equal(_logits(model, tokens), before)


def test_what_cannot_be_changed_of_other_kinds_is_refused() -> None:
    model = make_model("llama-gqa")
    with pytest.raises(AnalyzeError, match="feature 40 is outside the transcoder; it has 0-39"):
        with intervene(model, _transcoder(), LAYER, {40: 0.0}):
            pass
    with pytest.raises(AttachError, match=r"the transcoder is of None \(d_model 16\)"):
        with intervene(model, _transcoder(d_model=16), LAYER, {}):
            pass
