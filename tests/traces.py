"""Random dictionaries for tiny models, and prompts frozen in them."""

from collections.abc import Mapping
from typing import Any

import torch
from lorsa.circuits.tracing.freeze import freeze
from lorsa.circuits.tracing.frozen import Frozen
from lorsa.dictionaries.dictionary import Dictionary
from lorsa.dictionaries.linear_config import SaeConfig, TranscoderConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.sae import Sae
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.sites import SITE_NAMES, Ports
from tiny import config_like, make_model, read_layer

N_FEATURES, TOP_K, N_TOKENS = 24, 3, 9

ALL = dict.fromkeys(range(3), "lorsa transcoder")
CASES = {
    "llama-gqa": ALL,
    "qwen2": {0: "lorsa skip", 1: "transcoder", 2: "lorsa skip"},
    "qwen3": {0: "lorsa transcoder", 1: "skip", 2: "transcoder"},
    "gemma2": {0: "lorsa transcoder", 1: "skip", 2: "lorsa mlp_out"},
    "gemma3": {0: "transcoder", 1: "attn_out skip", 2: "lorsa skip"},
    "gpt2": {0: "skip", 1: "lorsa transcoder", 2: "attn_out transcoder"},
    "neox-partial": {0: "skip", 1: "lorsa transcoder", 2: "attn_out skip"},
    "granite": {0: "lorsa skip", 1: "lorsa transcoder", 2: "lorsa transcoder"},
    "olmo": {0: "skip", 2: "transcoder"},
    "deepseek-v3": {0: "skip", 2: "transcoder"},
    "gpt-oss": {0: "skip", 2: "lorsa transcoder"},
    "qwen3-next": {0: "skip", 2: "lorsa transcoder"},
}
"""What stands where, by family: everything replaced, parts, skips, SAEs, nothing."""


def make_dictionary(kind: str, layer: int, model: Any, d_model: int | None = None) -> Dictionary:
    """Return a dictionary of random weights: "lorsa", "transcoder", "skip", or an SAE's site."""
    sizes = {
        "d_model": d_model or model.config.get_text_config().hidden_size,
        "top_k": TOP_K,
        "layer": layer,
    }
    dictionary: Dictionary
    if kind == "lorsa":
        geometry = read_layer(model, layer)[0].geometry
        dictionary = Lorsa(config_like(geometry, n_ov_heads=6 * geometry.n_heads, **sizes))
    elif kind in SITE_NAMES:
        dictionary = Sae(SaeConfig(n_features=N_FEATURES, site=kind, **sizes))
    else:
        skip = kind == "skip"
        dictionary = Transcoder(TranscoderConfig(n_features=N_FEATURES, skip=skip, **sizes))
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return dictionary.eval()


def placed(model: Any, kinds: Mapping[int, str]) -> dict[Ports, Dictionary]:
    """Return dictionaries by layer and kind, as {0: "lorsa transcoder", 1: "skip"}."""
    made = [
        make_dictionary(kind, at, model) for at, names in kinds.items() for kind in names.split()
    ]
    return {dictionary.config.ports: dictionary for dictionary in made}


def frozen_in(family: str, kinds: Mapping[int, str], n_tokens: int = N_TOKENS) -> Frozen:
    """Return a random prompt frozen in a tiny model with random dictionaries."""
    model = make_model(family)
    tokens = torch.randint(0, 400, (n_tokens,), generator=torch.Generator().manual_seed(3))
    return freeze(model, placed(model, kinds), tokens)
