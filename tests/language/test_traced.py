"""Attention is told by what modules compute, whatever their classes are called."""

from typing import Any

import pytest
import torch
import transformers
from lorsa.errors import AttachError, LanguageModelError
from lorsa.language.blocks import attention_modules, attention_sites
from lorsa.language.families import attention_names, attention_of
from lorsa.language.traced import ADDED, find_attention, modules_after
from tiny import GQA, SIZES, SPECIAL, make_model
from torch import Tensor, nn

ZAMBA2 = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "attention_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "num_mem_blocks": 1,
    "chunk_size": 8,
    "use_mem_rope": True,
    "layers_block_type": ["mamba", "hybrid"] * 2,
}


class _Wrapped(nn.Module):
    """Something in the place of an attention module that gives its output another treatment."""

    def __init__(self, inner: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, hidden_states: Tensor, **settings: Any) -> tuple[Tensor, None]:
        return self.after(self.inner(hidden_states, **settings)[0]), None


class SomeAttentionDecoderLayer(_Wrapped):
    """Whole block with a name like an attention's."""


class Mixer(_Wrapped):
    """Attention under another name."""


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(32, 32)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.rows(y.new_ones(y.shape)).sigmoid()


def _with(wrapper: type[_Wrapped], after: nn.Module) -> Any:
    model = make_model("llama-gqa")
    for block in model.model.layers:
        block.self_attn = wrapper(block.self_attn, after)
    return model


def test_a_whole_block_called_attention_is_not_taken_for_it() -> None:
    """The outermost class called ...Attention... was taken: y of Zamba 2 was that of a block."""
    config = transformers.Zamba2Config(**(SIZES | SPECIAL | ZAMBA2))
    with pytest.raises(
        LanguageModelError,
        match=r"layer 1: the output of model.layers.1.shared_transformer.self_attn, .* goes into a "
        r"product with weights in .*feed_forward.gate_up_proj, so it is not what the layer adds",
    ):
        attention_names(attention_of(config))


@pytest.mark.parametrize("wrapper", [SomeAttentionDecoderLayer, Mixer])
def test_the_attention_is_what_is_added_to_the_stream(wrapper: type[_Wrapped]) -> None:
    """Through a norm and a scale that change nothing of what it is."""
    model = _with(wrapper, nn.Sequential(nn.LayerNorm(32), nn.Dropout(), nn.Identity()).eval())
    found = attention_modules(model)
    assert {i: (f.name, f.fate, f.n_calls) for i, f in found.items()} == {
        i: (f"model.layers.{i}.self_attn.inner", ADDED, 1) for i in range(3)
    }


@pytest.mark.parametrize("wrapper", [SomeAttentionDecoderLayer, Mixer])
def test_what_is_done_to_an_output_before_it_is_added_is_seen(wrapper: type[_Wrapped]) -> None:
    """Then the layer adds what the wrapper gives, of which the attention is a part."""
    model = _with(wrapper, nn.Linear(32, 32))
    assert [site.name for site in attention_sites(model, [0, 2])] == [
        "model.layers.0.self_attn",
        "model.layers.2.self_attn",
    ]


def test_an_output_that_is_gated_after_the_layer_is_refused() -> None:
    model = make_model("llama-gqa")
    gate = nn.Linear(32, 32)
    norm = model.model.layers[1].post_attention_layernorm

    def by_tokens(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return (output[0] * gate(kwargs["hidden_states"]).sigmoid(), *output[1:])

    model.model.layers[1].self_attn.register_forward_hook(by_tokens, with_kwargs=True)
    assert find_attention(model)[1].fate == ADDED  # within the module, so a part of it
    bloom = make_model("bloom")
    with pytest.raises(AttachError, match=r"h.1.self_attention, .* goes into a product with weigh"):
        attention_sites(bloom, [1])
    assert norm is model.model.layers[1].post_attention_layernorm


def test_a_decoder_whose_attention_has_its_output_elsewhere_is_refused() -> None:
    """BERT's heads are joined by another module, which adds the residual stream too."""
    config = transformers.BertConfig(**SIZES, is_decoder=True)
    with pytest.raises(LanguageModelError, match=r"attention.self, .*attention.output.dense"):
        attention_names(attention_of(config))


def test_a_module_that_several_layers_share_is_refused() -> None:
    """Its hook would see the call of another layer."""
    model = make_model("llama-gqa")
    model.model.layers[2].self_attn = model.model.layers[1].self_attn
    with pytest.raises(AttachError, match=r"layer 1: .*, runs 2 times in a pass; give --layers ou"):
        attention_sites(model, [1])
    with pytest.raises(AttachError, match="layer 2 has no attention; give --layers out of 0"):
        attention_sites(model, [2])


def test_what_mixes_tokens_without_a_softmax_is_no_attention() -> None:
    """Layers of RWKV and linear ones of MiniMax have classes called so."""
    rwkv = transformers.RwkvConfig(
        vocab_size=400, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2
    )
    with pytest.raises(LanguageModelError, match="models of type rwkv have no attention"):
        attention_of(rwkv)
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    minimax = transformers.MiniMaxConfig(
        **SIZES, **SPECIAL, **GQA, **experts, head_dim=8, block_size=8, layer_types=kinds
    )
    assert list(attention_names(attention_of(minimax))) == [1]


def test_a_layer_is_found_without_weights_as_with_them() -> None:
    model = make_model("gpt-neo")
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    assert find_attention(empty) == find_attention(model)


def test_modules_after_a_layer_are_those_that_begin_later() -> None:
    later = modules_after(make_model("llama-gqa"), "model.layers.1.self_attn")
    assert {"lm_head", "model.norm", "model.layers.2", "model.layers.1.mlp"} <= later
    assert not {"model.layers.1.self_attn.o_proj", "model.layers.0.mlp", "model"} & later


def test_a_model_that_does_not_run_is_one_line() -> None:
    model = make_model("llama-gqa")
    model.model.layers[1].self_attn = nn.Linear(3, 3)
    with pytest.raises(AttachError, match=r"type llama does not run on a few tokens \(TypeError: "):
        attention_sites(model, [0])
