"""What bench_step.py trains: a dictionary of each kind at random, a batch, and who trains it.

"ours" is the dictionary, "dense" what implementations without a sparse kernel do, "tuned" what a
careful one of them does (dense_baseline.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from dense_baseline import (
    dense_forward,
    dense_linear_forward,
    tuned_forward,
    tuned_linear_forward,
)
from lorsa.dictionaries.dictionary import Dictionary
from lorsa.dictionaries.linear_config import SaeConfig, TranscoderConfig
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.sae import Sae
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.language.geometry import Rope
from torch import Tensor

LINEAR_TOP_K = 32
"""Features of a token of SAEs and transcoders."""


class Preset(NamedTuple):
    """Sizes of a dictionary and its batch."""

    d_model: int
    n_qk_heads: int
    """Without meaning but for Lorsas, as the next"""
    d_qk_head: int
    n_features: int
    """OV heads of a Lorsa"""
    top_k: int
    batch: int
    seq: int


class Case(NamedTuple):
    """A dictionary with a batch to train on."""

    kind: str
    preset: Preset
    dictionary: Any
    x: Tensor
    y: Tensor


PRESETS = {
    "smollm2": Preset(576, 36, 64, 4_608, 64, 8, 256),
    "smollm2-32x": Preset(576, 144, 64, 18_432, 64, 8, 256),
    "pythia-160m": Preset(768, 48, 64, 6_144, 64, 32, 1_024),
    "llama-3.1-8b": Preset(4_096, 256, 128, 32_768, 128, 16, 1_024),
    "paper-g1": Preset(768, 6_144, 64, 6_144, 64, 8, 1_024),
}
KINDS = ("lorsa", "sae", "transcoder")
Forward = Callable[[Any, Tensor], Tensor]
SIDES = ("ours", "dense", "tuned")


def forward_of(side: str, kind: str) -> Forward:
    """Return the function from a dictionary and x to y_hat by which a side computes it."""
    if side == "ours":
        return lambda dictionary, x: dictionary(x)
    if kind == "lorsa":
        return dense_forward if side == "dense" else tuned_forward
    return dense_linear_forward if side == "dense" else tuned_linear_forward


def make_case(preset: str, *, kind: str = "lorsa", device: str, backend: str = "auto") -> Case:
    """Return a dictionary at random whose z are spread like those of a trained one, and a batch."""
    p = PRESETS[preset]
    p = p if kind == "lorsa" else p._replace(top_k=LINEAR_TOP_K)
    torch.manual_seed(0)
    with torch.device(device):
        dictionary = _make(kind, p, backend).to(device)
        with torch.no_grad():
            for name, weight in dictionary.named_parameters():
                if name.startswith("W_"):
                    weight.normal_(std=p.d_model**-0.5)
        x, y = torch.randn(2, p.batch, p.seq, p.d_model)
    return Case(kind, p, dictionary, x, x if kind == "sae" else y)


def _make(kind: str, p: Preset, backend: str) -> Dictionary:
    """Return a dictionary of zeros of a preset's sizes."""
    if kind == "lorsa":
        return Lorsa(_lorsa_config(p), backend=backend)
    if kind == "sae":
        sae = SaeConfig(d_model=p.d_model, n_features=p.n_features, top_k=p.top_k, site="resid_out")
        return Sae(sae, backend=backend)
    transcoder = TranscoderConfig(d_model=p.d_model, n_features=p.n_features, top_k=p.top_k)
    return Transcoder(transcoder, backend=backend)


def _lorsa_config(p: Preset) -> LorsaConfig:
    return LorsaConfig(
        d_model=p.d_model,
        n_qk_heads=p.n_qk_heads,
        d_qk_head=p.d_qk_head,
        n_ov_heads=p.n_features,
        top_k=p.top_k,
        scale=p.d_qk_head**-0.5,
        rope=Rope(inv_freq=tuple(10_000 ** (-i / p.d_qk_head) for i in range(0, p.d_qk_head, 2))),
    )
