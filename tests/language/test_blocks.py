"""Attention is found where it is; that it is the right module, test_families.py says."""

from typing import Any

import pytest
import torch
import transformers
from lorsa.errors import AttachError
from lorsa.language.blocks import attention_modules, attention_sites
from tiny import FAMILIES, make_model
from torch import Tensor


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_outside_the_model_is_named(layer: int) -> None:
    with pytest.raises(AttachError, match=f"layer {layer} is outside the model; it has 0-2"):
        attention_sites(make_model("llama-gqa"), [0, layer])


def test_sites_are_in_the_order_asked_for() -> None:
    model = make_model("gpt2")
    sites = attention_sites(model, [2, 0])
    assert [site.layer for site in sites] == [2, 0]
    assert [site.name for site in sites] == ["transformer.h.2.attn", "transformer.h.0.attn"]
    assert all(site.module is model.get_submodule(site.name) for site in sites)


def test_a_model_without_its_head_has_the_same_layers() -> None:
    model = transformers.AutoModel.from_config(FAMILIES["llama-gqa"]())
    names = {layer: found.name for layer, found in attention_modules(model).items()}
    assert names == {i: f"layers.{i}.self_attn" for i in range(3)}


class _Mix(torch.nn.Module):
    """What stands in for attention where tokens are mixed without a softmax."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states.cumsum(dim=1), None


def test_layers_without_attention_are_named() -> None:
    model = make_model("llama-gqa")
    model.model.layers[1].self_attn = _Mix()
    with pytest.raises(AttachError, match="layer 1 has no attention; give --layers out of 0,2"):
        attention_sites(model, [0, 1])
    for layer in model.model.layers:
        layer.self_attn = _Mix()
    with pytest.raises(AttachError, match="models of type llama have no attention that lorsa can"):
        attention_sites(model, [0])


def test_what_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(AttachError, match="Linear is no language model of transformers; give one"):
        attention_sites(torch.nn.Linear(2, 2), [0])
