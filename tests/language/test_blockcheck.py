"""MLP, norms and sums that are read off a model are the model's: every family of tiny.py."""

from typing import Any

import pytest
import torch
import transformers
from lorsa.errors import LanguageModelError
from lorsa.language.attention import layer_attention
from lorsa.language.block import BlockReading, Derivation
from lorsa.language.blockcheck import Understanding, block_error, understand_block
from lorsa.language.blocks import find_blocks
from lorsa.language.capture import Capture
from lorsa.language.mlp import MlpGeometry, MlpWeights, layer_mlp
from lorsa.sites import Site
from tiny import FAMILIES, GQA, OTHERS, SIZES, make_model, read_layer, some_tokens
from torch import Tensor, nn

EXPERTS = ("gpt-oss", "qwen3-next", "llama4", "llama4-no-norm", "qwen2-moe", "qwen3-moe", "mixtral")
READ = {
    "gpt2": ("gelu_tanh", False),
    "opt": ("relu", False),
    "falcon": ("gelu", False),
    "gemma2": ("gelu_tanh", True),
    "phi3": ("silu", True),
    "llama-gqa": ("silu", True),
}


def _look(model: Any, layer: int = 1, **settings: Any) -> tuple[dict[str, Tensor], Understanding]:
    """Return the sites of a layer on some tokens, and what is understood of it."""
    block = find_blocks(model)[layer]
    spots = {Site(layer, name): spot for name, spot in block.spots.items()}
    with Capture(model, spots=spots, blocks={layer: block.name}) as capture:
        seen = capture.see(some_tokens())
    sites = {site.name: values.clone() for site, values in seen.sites.items()}
    return sites, understand_block(model, block, seen.blocks[layer], sites, **settings)


def _difference(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", [*FAMILIES, *(name for name in OTHERS if name != "bitnet")])
def test_mlp_out_is_recomputed_from_mlp_in(family: str) -> None:
    for layer in range(3):
        sites, (mlp, _block) = _look(make_model(family), layer)
        assert mlp is not None
        if family in EXPERTS:
            assert mlp.reading is None
            assert mlp.check.reason == "it is a mixture of experts"
            assert mlp.facts()["geometry"] is None
            continue
        assert mlp.reading is not None
        again = layer_mlp(sites["mlp_in"], mlp.reading.weights, mlp.reading.geometry)
        assert _difference(again, sites["mlp_out"]) < 1e-4
        if family in READ:
            geometry = mlp.reading.geometry
            assert (geometry.activation, geometry.gated) == READ[family]


@pytest.mark.parametrize("family", [*FAMILIES, "gptj", "mpt"])
def test_the_residual_stream_adds_up(family: str) -> None:
    for layer in range(3):
        sites, (_mlp, block) = _look(make_model(family), layer)
        assert block.reading is not None
        assert block.check.error < 1e-5
        added = {name: sites[name] for name in ("resid_in", "attn_out", "mlp_out")}
        total = Derivation(added, block=block.reading).site("resid_out")
        assert _difference(total, sites["resid_out"]) < 1e-4
        assert ("resid_mid" in sites) == (not block.reading.geometry.is_parallel)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in EXPERTS])
def test_all_sites_follow_from_the_residual_stream(family: str) -> None:
    """As a store keeps the weights: every part is written down and read again."""
    model = make_model(family)
    sites, (mlp, block) = _look(model)
    assert mlp is not None
    (geometry, weights), _x, _y = read_layer(model, 1)
    shape = MlpGeometry.from_dict(mlp.facts()["geometry"])
    derivation = Derivation(
        {"resid_in": sites["resid_in"]},
        block=BlockReading.stored(block.facts()["geometry"], block.weights),
        attention=lambda x: layer_attention(x, weights, geometry),
        mlp=lambda x: layer_mlp(x, MlpWeights(**mlp.weights), shape),
    )
    for name, values in sites.items():
        assert _difference(derivation.site(name), values) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "gpt2", "falcon", "opt", "olmo2"])
def test_the_check_is_as_strict_in_half_precision(family: str, dtype: torch.dtype) -> None:
    _sites, (mlp, block) = _look(make_model(family).to(dtype))
    assert mlp is not None
    assert mlp.check.error < 1e-5
    assert block.check.error < 1e-5
    assert mlp.check.noise > 1e-5
    assert {w.dtype for w in mlp.weights.values()} == {dtype}


def test_a_multiplier_of_what_is_added_is_read() -> None:
    config = transformers.GraniteConfig(**SIZES, **GQA, residual_multiplier=0.22)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _sites, (_mlp, block) = _look(model)
    assert block.reading is not None
    assert block.reading.geometry.multiplier == 0.22


class _Scaled(nn.Module):
    """Something that is added to the residual stream besides what a store knows of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * 1.01


def test_a_stream_that_does_not_add_up_is_found() -> None:
    model = make_model("llama-gqa")
    model.model.layers[1] = _Scaled(model.model.layers[1])
    for name in ("attention_type", "self_attn"):
        if hasattr(model.model.layers[1].inner, name):
            setattr(model.model.layers[1], name, getattr(model.model.layers[1].inner, name))
    _sites, (_mlp, block) = _look(model)
    assert block.reading is None
    assert block.check.reason is not None
    assert block.check.reason.startswith("resid_out recomputed from the other sites of its layer")


@pytest.mark.parametrize("site", ["attn_in", "resid_mid", "mlp_in", "resid_out"])
def test_each_site_is_compared(site: str) -> None:
    sites, (_mlp, block) = _look(make_model("gemma2"))
    assert block.reading is not None
    wrong = sites | {site: sites[site] * 1.001}
    assert block_error(block.reading, wrong)[1] > 1e-4


class _Clamped(nn.Module):
    """Activation that does something else where its input is large."""

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.silu(z).clamp(max=40.0)


def test_an_mlp_that_acts_rarely_is_found_by_probes() -> None:
    model = make_model("llama-gqa")
    assert _look(model)[1].mlp.check.passed  # type: ignore[union-attr]
    model.model.layers[1].mlp.act_fn = _Clamped()
    mlp = _look(model)[1].mlp
    assert mlp is not None
    assert mlp.reading is None
    assert mlp.check.reason is not None
    assert "times its input" in mlp.check.reason


def test_what_is_no_mlp_is_unknown_with_a_reason() -> None:
    model = make_model("llama-gqa")
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    mlp = _look(model)[1].mlp
    assert mlp is not None
    assert mlp.check.reason is not None
    assert mlp.check.reason.startswith("an MLP recomputed from what was read of the model differs")


def test_activations_that_are_not_finite_are_named_or_kept() -> None:
    model = make_model("llama-gqa")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(LanguageModelError, match="layer 1: its activations are not finite"):
        _look(model)
    mlp, block = _look(model, keep_nonfinite=True)[1]
    assert mlp is not None
    assert mlp.reading is None
    assert block.check.reason == "its activations are not finite"


def test_tokens_in_chunks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sites, (mlp, _block) = _look(make_model("gpt2"))
    assert mlp is not None
    assert mlp.reading is not None
    monkeypatch.setattr("lorsa.language.mlp.CHUNK_ELEMENTS", 5 * mlp.reading.geometry.d_mlp)
    again = layer_mlp(sites["mlp_in"], mlp.reading.weights, mlp.reading.geometry)
    assert _difference(again, sites["mlp_out"]) < 1e-6
