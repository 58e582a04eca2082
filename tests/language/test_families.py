"""What is read off a model is what the model does: every family, against plain transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lorsa.errors import LanguageModelError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.language.attention import layer_attention
from lorsa.language.blocks import attention_sites, find_blocks
from lorsa.language.capture import Capture
from lorsa.language.families import SUPPORTED, attention_names, attention_of, require_attention
from lorsa.language.geometry import Rope
from lorsa.language.selfcheck import (
    LIMIT,
    LayerCheck,
    SelfCheck,
    reading_error,
    require_understood,
    understand,
)
from lorsa.sites import Site, attention_ports
from lorsa.store.read.reader import ActivationStore
from tiny import FAMILIES, N_CTX, make_model, make_tokenizer, read_layer, some_tokens
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

LAYERS = [0, 2]

PLACES = {
    "neox": ("gpt_neox.layers", "input_layernorm", "attention"),
    "gemma3-multimodal": ("model.language_model.layers", "input_layernorm", "self_attn"),
    "gpt2": ("transformer.h", "ln_1", "attn"),
    "gpt-neo": ("transformer.h", "ln_1", "attn.attention"),
    "falcon": ("transformer.h", "input_layernorm", "self_attention"),
    "falcon-alibi": ("transformer.h", "input_layernorm", "self_attention"),
    "falcon-alibi-rounded": ("transformer.h", "input_layernorm", "self_attention"),
    "mpt": ("transformer.blocks", "norm_1", "attn"),
    "falcon-new": ("transformer.h", "ln_attn", "self_attention"),
    "opt": ("model.decoder.layers", "self_attn_layer_norm", "self_attn"),
    "olmo2": ("model.layers", "", "self_attn"),
    "olmo3": ("model.layers", "", "self_attn"),
}
"""Of models that are not laid out like Llama: the list of layers, the norm whose output is x (""
where x is the input of the layer itself), the attention."""


def _place(family: str) -> tuple[str, str, str]:
    stem = family if family in PLACES else family.split("-")[0]
    return PLACES.get(stem, ("model.layers", "input_layernorm", "self_attn"))


MLPS = {
    "opt": ("fc1", "fc2"),
    "mpt": ("ffn", "ffn.down_proj"),
    **dict.fromkeys(("llama4", "llama4-no-norm"), ("feed_forward", "feed_forward")),
}
"""Of models whose MLP is no one module: what reads its input, and what gives its output."""
MIDDLES = {
    "gpt2": "ln_2",
    "mpt": "norm_2",
    "gpt2-by-layer": "ln_2",
    "gpt-neo": "ln_2",
    "opt": "final_layer_norm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "gemma3-multimodal": "pre_feedforward_layernorm",
    "olmo2": "mlp",
    "olmo3": "mlp",
    **dict.fromkeys(("phi", "phi-norm", "stablelm-norm", "cohere", "cohere2"), ""),
    **dict.fromkeys(("falcon", "falcon-new", "falcon-alibi", "falcon-alibi-rounded"), ""),
    "neox-partial": "",
}
"""Module that reads the residual stream between attention and MLP, where it is not called
post_attention_layernorm; "" where there is no such place."""


def _plain_hooks(family: str, model: Any, tokens: Tensor) -> dict[Site, Tensor]:
    """Catch every site with hooks of torch alone; x as the norm gives it, y as the layer adds it.

    What is caught is copied at once.
    """
    found: dict[Site, Tensor] = {}
    handles = []

    def tensor(value: Any) -> Tensor:
        value = value[0] if isinstance(value, tuple) else value
        return value.clone().view(*tokens.shape, -1)  # OPT flattens what its MLP reads

    def on_input(site: Site, module: Any) -> None:
        def hook(_m: Any, args: Any, kwargs: Any) -> None:
            found[site] = tensor(args[0] if args else kwargs["hidden_states"])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(site: Site, module: Any) -> None:
        def hook(_m: Any, _a: Any, output: Any) -> None:
            found[site] = tensor(output)

        handles.append(module.register_forward_hook(hook))

    blocks, norm, attention = _place(family)
    first, last = MLPS.get(family, ("mlp", "mlp"))
    middle = MIDDLES.get(family, "post_attention_layernorm")
    for i, layer in enumerate(model.get_submodule(blocks)):
        on_input(Site(i, "resid_in"), layer)
        if norm:
            on_output(Site(i, "attn_in"), layer.get_submodule(norm))
        else:
            on_input(Site(i, "attn_in"), layer)
        on_output(Site(i, "attn_out"), layer.get_submodule(attention))
        if middle:
            on_input(Site(i, "resid_mid"), layer.get_submodule(middle))
        on_input(Site(i, "mlp_in"), layer.get_submodule(first))
        on_output(Site(i, "mlp_out"), layer.get_submodule(last))
        on_output(Site(i, "resid_out"), layer)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)  # with one, transformers 4 rounds otherwise
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_sees_what_plain_hooks_see(family: str) -> None:
    model = make_model(family)
    expected = _plain_hooks(family, model, some_tokens())
    with Capture(model, attention_sites(model, LAYERS)) as capture:
        found = capture.run(some_tokens())
    assert sorted(found) == [Site(i, name) for i in LAYERS for name in ("attn_in", "attn_out")]
    for site, values in found.items():
        assert torch.equal(values, expected[site])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_what_plain_hooks_see(family: str) -> None:
    model = make_model(family)
    expected = _plain_hooks(family, model, some_tokens())
    blocks = find_blocks(model)
    spots = {Site(i, name): spot for i in LAYERS for name, spot in blocks[i].spots.items()}
    with Capture(model, spots=spots) as capture:
        found = capture.run(some_tokens())
    assert set(found) == {site for site in expected if site.layer in LAYERS}
    for site, values in found.items():
        assert torch.equal(values, expected[site]), site


@pytest.mark.parametrize("family", FAMILIES)
def test_y_is_recomputed_from_x(family: str) -> None:
    model = make_model(family)
    for layer in range(3):
        (geometry, weights), x, y = read_layer(model, layer)
        again = layer_attention(x, weights, geometry)
        assert (again - y).norm() / y.norm() < 1e-4


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *[(family, "float32") for family in FAMILIES],
        *[(f, d) for f in ("llama-gqa", "gemma2", "gpt2") for d in ("float16", "bfloat16")],
    ],
)
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
            batch_size=1,
            dtype=dtype,
            device="cpu",
        )
    )
    store = ActivationStore.open(tmp_path / "acts")
    assert all(
        store.manifest.modules[f"{layer}.attention"]["self_check"]["passed"] for layer in LAYERS
    )
    for seq in range(store.manifest.n_seq):
        expected = _plain_hooks(family, model, store.tokens([seq]).long())
        for layer in LAYERS:
            plain = (expected[Site(layer, name)] for name in ("attn_in", "attn_out"))
            found = store.activations(attention_ports(layer), [seq])
            for stored, one in zip(found, plain, strict=True):
                assert torch.equal(stored, one.to(getattr(torch, dtype)))


def _check(model: Any) -> LayerCheck:
    """Check one layer."""
    site = attention_sites(model, [1])[0]
    with Capture(model, [site]) as capture:
        return understand(model, site, capture.calls(some_tokens())[1]).check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_passes_in_any_precision(family: str, dtype: torch.dtype) -> None:
    """It once compared with the model's own half-precision output, which is off by a percent."""
    check = _check(make_model(family).to(dtype))
    assert check.error < 1e-5
    assert check.passed
    assert (check.noise < 1e-5) == (dtype == torch.float32)


def test_the_self_check_bears_large_biases_in_half_precision() -> None:
    """As Qwen 2 has them in its keys."""
    model = make_model("qwen2")
    for projection in ("q_proj", "k_proj"):
        getattr(model.model.layers[1].self_attn, projection).bias.data.mul_(50)
    assert _check(model.to(torch.bfloat16)).error < 1e-4


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
def test_the_self_check_finds_a_wrong_geometry(changes: dict[str, Any]) -> None:
    reading, x, y = read_layer(make_model("llama-gqa"), 1)
    assert reading_error(reading, x, y) < LIMIT
    wrong = reading._replace(geometry=dataclasses.replace(reading.geometry, **changes))
    assert reading_error(wrong, x, y) > 1e-3


def test_what_is_not_understood_is_named() -> None:
    """A supported model that does something else than its class."""
    model = make_model("llama-gqa")
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _m, _a, y: y + 1)
    check = _check(model)
    assert not check.passed
    with pytest.raises(LanguageModelError, match=r"layer 1: .* differs by .*--no-selfcheck"):
        require_understood(SelfCheck({1: check}))


def test_the_self_check_says_when_activations_are_not_finite() -> None:
    model = make_model("llama-gqa")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(LanguageModelError, match="layer 1: its activations are not finite"):
        _check(model)


def test_nothing_after_the_last_layer_is_computed() -> None:
    model = make_model("llama-gqa")
    sites = attention_sites(model, [0, 1])
    ran: list[str] = []
    model.model.layers[2].register_forward_hook(lambda *_: ran.append("layer 2"))
    model.lm_head.register_forward_hook(lambda *_: ran.append("logits"))
    with Capture(model, sites) as capture:
        capture.run(some_tokens())
    assert ran == []


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = make_model("llama-gqa")
    sites = attention_sites(model, [0, 1])
    with pytest.raises(IndexError), Capture(model, sites) as capture:
        capture.run(torch.full((1, 4), 10_000))
    assert not any(site.module._forward_hooks for site in sites)


def test_geometry_is_read_not_assumed() -> None:
    def geometry(family: str, layer: int = 2) -> Any:
        return read_layer(make_model(family), layer)[0].geometry

    assert len(geometry("neox-partial").rope.inv_freq) == 1
    assert geometry("llama-yarn-rope").rope.attention_scaling > 1
    assert geometry("mistral-window").window == 7
    assert geometry("qwen2-window").window == 5
    assert geometry("qwen2").window is None
    assert geometry("qwen3").qk_norm.eps == 1e-6
    assert geometry("llama-wide-heads").d_head == 16
    assert geometry("llama-mqa-bias").n_kv_heads == 1
    assert geometry("gemma2").softcap == 2.0
    assert geometry("gemma2").scale == 0.5
    assert [geometry("gemma3", layer).window for layer in (0, 1)] == [7, None]
    slowest = [geometry("gemma3", layer).rope.inv_freq[-1] for layer in (0, 1)]
    assert slowest[0] > 10 * slowest[1]
    assert [geometry("smollm3", layer).rope is None for layer in (0, 1)] == [False, True]
    assert geometry("cohere").rope.interleaved
    assert geometry("gpt2").rope is None
    assert geometry("olmo2").qk_norm.kind == "rms_full"
    assert geometry("cohere").qk_norm.kind == "layer"
    assert geometry("granite").scale == 0.2
    assert geometry("gpt-neo", 1).window == 6


def test_norms_of_one_plus_a_weight_are_folded() -> None:
    model = make_model("gemma3")
    weight = model.model.layers[1].self_attn.q_norm.weight
    assert torch.equal(read_layer(model, 1)[0].weights.q_norm, 1 + weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_alone_names_the_modules(family: str) -> None:
    model = make_model(family)
    names = attention_names(attention_of(FAMILIES[family]()))
    assert sorted(names) == [0, 1, 2]
    sites = attention_sites(model, [0, 1, 2])
    assert {site.layer: site.name for site in sites} == names


def test_tested_families_are_those_that_are_called_supported() -> None:
    tried = {FAMILIES[family]().get_text_config().model_type for family in FAMILIES}
    assert tried == {kind for kind in SUPPORTED if kind in CONFIG_MAPPING_NAMES}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.BertConfig(), "type bert are encoders; give a causal"),
        (lambda: transformers.RobertaConfig(), "are encoders"),
        (lambda: transformers.DistilBertConfig(), "are encoders"),
        (lambda: transformers.T5Config(), "type t5 have an encoder and a decoder"),
        (lambda: transformers.BartConfig(), "have an encoder and a decoder"),
        (lambda: transformers.ViTConfig(), "type vit are none that transformers .* has as causal"),
        (lambda: transformers.MambaConfig(num_hidden_layers=2), "type mamba have no attention"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(config: Any, message: str) -> None:
    with pytest.raises(LanguageModelError, match=message):
        attention_of(config())


def test_layers_without_attention_are_named() -> None:
    """State-space layers of a hybrid."""
    config = transformers.JambaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        vocab_size=400,
    )
    found = attention_of(config)
    names = attention_names(found)
    assert names == {1: "model.layers.1.self_attn", 3: "model.layers.3.self_attn"}
    require_attention(found, [1, 3])
    with pytest.raises(
        LanguageModelError, match="layer 2 has no attention; give --layers out of 1,3"
    ):
        require_attention(found, [1, 2])
