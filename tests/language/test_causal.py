"""Attention that reads later tokens is no causal language model's."""

from typing import Any

import pytest
import torch
from lorsa.errors import LanguageModelError
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.causal import require_causal
from tiny import make_model, some_tokens

CAUSAL = ("llama-gqa", "mpt", "gpt-neo", "falcon-alibi")


def _look(model: Any, layers: list[int], tokens: torch.Tensor) -> None:
    with Capture(model, attention_sites(model, [0, 1, 2])) as capture:
        require_causal(capture, tokens, layers)


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_attention_passes(family: str) -> None:
    for tokens in (some_tokens()[0], torch.zeros(9, dtype=torch.long)):
        _look(make_model(family), [0, 2], tokens)


@pytest.mark.parametrize("tokens", [some_tokens()[0], torch.zeros(9, dtype=torch.long)])
def test_attention_to_later_tokens_is_refused(tokens: torch.Tensor) -> None:
    """Layers of unknown geometry were stored whatever they read."""
    model = make_model("llama-gqa")
    model.model.layers[1].self_attn.is_causal = False
    _look(model, [0], tokens)
    with pytest.raises(LanguageModelError, match="layer 1: .* depends on later tokens"):
        _look(model, [1], tokens)
    _look(model, [], tokens)
