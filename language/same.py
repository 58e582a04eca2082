"""Comparison of a model's weights with those that a store keeps."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LanguageModelError
from ..store.fixed import read_weights
from ..store.manifest import Manifest
from ..store.places import Place
from .blocks import AttentionSite, Block, attention_sites, find_blocks
from .mlp_readings import mlp_weights
from .norms import Norm
from .projections import Unreadable, weight_readings

NORM_TOLERANCE = 1e-5
"""Relative difference of a norm's weights, which are read by probing."""


def require_same_weights(
    model: Any, layers: Sequence[int], root: Place, manifest: Manifest
) -> None:
    """Raise LanguageModelError unless a model's layers have the weights that a store keeps."""
    parts = (
        module.partition(".") for module, facts in manifest.modules.items() if facts["weights"]
    )
    stored = [(int(layer), kind) for layer, _, kind in parts if int(layer) in layers]
    with_attention = [layer for layer, kind in stored if kind == "attention"]
    attention = {site.layer: site for site in attention_sites(model, with_attention)}
    blocks = find_blocks(model) if len(stored) > len(with_attention) else {}
    for layer, kind in stored:
        theirs = read_weights(root, manifest, f"{layer}.{kind}")
        at = attention[layer] if kind == "attention" else blocks[layer]
        try:
            others = [_unlike(mine, theirs) for mine in _mine(model, at, kind)]
        except (Unreadable, LanguageModelError):
            others = [f"kind of {kind}"]
        if all(others):
            raise LanguageModelError(
                f"{root} was made with another model: layer {layer} has another {others[0]}; "
                "give the model that `lorsa store info` names"
            )


def _mine(model: Any, at: AttentionSite | Block, kind: str) -> Iterator[dict[str, Tensor]]:
    """Yield a module's weights by name, in every way that they may be meant."""
    if isinstance(at, AttentionSite):
        yield from (weights.present() for weights in weight_readings(model, at))
    elif kind == "mlp":
        yield from (weights.present() for weights in mlp_weights(model, at))
    else:
        named = {name: path for name, path in at.norms._asdict().items() if path}
        width = model.config.get_text_config().hidden_size
        norms = {n: Norm.read(model.get_submodule(path), width) for n, path in named.items()}
        yield {name: norm.weight.float() for name, norm in norms.items()} | {
            f"{name}_bias": norm.bias.float() for name, norm in norms.items()
        }


def _unlike(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> str | None:
    """Return the name of the first weight that differs, None if none does."""
    for name, their in theirs.items():
        our = mine.get(name)
        if our is None or our.shape != their.shape or not _alike(name, our.cpu(), their):
            return name
    return None


def _alike(name: str, our: Tensor, their: Tensor) -> bool:
    if name.startswith(("before_", "after_")):
        return torch.allclose(our.to(their), their, rtol=NORM_TOLERANCE, atol=NORM_TOLERANCE)
    return torch.equal(our.to(their.dtype), their)
