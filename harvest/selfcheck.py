"""Trust nothing that was read off a model: recompute its attention and compare.

Each attention module is run once more in float32 on the x that was captured, and its output
compared with the one recomputed from the weights and the geometry that were read:

    error = ||module(x) - attention(x)|| / ||module(x)||      at most LIMIT, for any model
    noise = ||y - module(x)|| / ||module(x)||                 what the model's own precision costs

Both sides are float32, so a model in half precision is checked as strictly as any other.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model import AttentionGeometry, LayerWeights, layer_attention
from ..store import Manifest, Place
from ..store import read_weights as stored_weights
from .capture import Call, module_output
from .errors import HarvestError
from .sites import AttentionSite, read_weights, rotary_module

LIMIT = 1e-4
CHECKED_SEQS = 2


class LayerCheck(NamedTuple):
    """How well one layer is understood."""

    error: float
    """Relative difference of the recomputed output from the module's, both float32"""
    noise: float
    """Relative difference of the captured output from it"""
    finite: bool = True
    """Whether its first activations were; if not there was nothing to compare, error is NaN"""


class SelfCheck(NamedTuple):
    """How well all layers are."""

    layers: dict[int, LayerCheck]
    limit: float
    """A layer with a larger error is not understood"""

    def passed(self, layer: int) -> bool:
        """Tell whether a layer is understood."""
        return self.layers[layer].error <= self.limit


@torch.no_grad()
def check_geometry(
    model: Any,
    sites: list[AttentionSite],
    calls: dict[int, Call],
    weights: dict[int, LayerWeights],
    geometries: dict[int, AttentionGeometry],
    *,
    keep_nonfinite: bool = False,
) -> SelfCheck:
    """Recompute y from x for every layer, in float32.

    Args:
        model: the language model.
        sites: its attention layers.
        calls: what each was called with and returned, from `Capture.calls`.
        weights, geometries: of every layer, as they were read.
        keep_nonfinite: whether a layer with NaN or Inf counts as not passed instead of raising.

    Raises:
        HarvestError: an activation is not finite.
    """
    layers = {}
    for site in sites:
        call = calls[site.layer]
        x, y = call.x[:CHECKED_SEQS].float(), call.y[:CHECKED_SEQS].float()
        if not (x.isfinite().all() and y.isfinite().all()):
            if not keep_nonfinite:
                raise HarvestError(_not_finite(site.layer))
            layers[site.layer] = LayerCheck(math.nan, math.nan, finite=False)
            continue
        exact = _in_float32(model, site, call, x)
        wide = weights[site.layer].to(torch.float32)
        again = layer_attention(x, wide, geometries[site.layer])
        scale = exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
        error, noise = (again - exact).norm() / scale, (y - exact).norm() / scale
        layers[site.layer] = LayerCheck(float(error), float(noise))
    return SelfCheck(layers, LIMIT)


def require_passed(check: SelfCheck) -> None:
    """Raise HarvestError, naming the first that is not, unless all layers are understood.

    Layers that are not finite, and are kept all the same, are passed over.
    """
    for layer, found in check.layers.items():
        if found.finite and not check.passed(layer):
            raise HarvestError(
                f"layer {layer}: attention recomputed from what was read of the model differs by "
                f"{found.error:.1e} (allowed {check.limit:.0e}); lorsa does not understand this "
                "model. --no-selfcheck harvests it all the same, for init='random' only"
            )


def _not_finite(layer: int) -> str:
    return (
        f"layer {layer}: its activations are not finite (NaN or Inf from the model); try "
        "--model-dtype float32, check the model with a short prompt, or keep them with "
        "--keep-nonfinite and --outputs store"
    )


def _in_float32(model: Any, site: AttentionSite, call: Call, x: Tensor) -> Tensor:
    """Run a float32 copy of an attention module as it was run before, on x [n, seq, d_model]."""
    module = copy.deepcopy(site.module).float()
    module._forward_hooks.clear()
    settings = {name: _first_seqs(value, len(x)) for name, value in call.kwargs.items()}
    settings.pop("hidden_states", None)
    if "position_embeddings" in settings:
        rotary = rotary_module(model)
        position = torch.arange(x.shape[1], device=x.device)[None]
        settings["position_embeddings"] = rotary(x, position)
    return module_output(module(x, *call.args[1:], **settings))


def _first_seqs(value: Any, n_seqs: int) -> Any:
    """Return an argument of the module for the first sequences, in float32 if it is floating."""
    if not isinstance(value, Tensor):
        return value
    value = value[:n_seqs] if value.ndim > 1 else value
    return value.float() if value.is_floating_point() else value


def require_same_weights(
    model: Any, sites: list[AttentionSite], root: Place, manifest: Manifest
) -> None:
    """Raise HarvestError unless a model's attention weights are those of a store."""
    for site in sites:
        mine = read_weights(model, site).present()
        for name, theirs in stored_weights(root, manifest, site.layer).items():
            ours = mine.get(name)
            if ours is None or not torch.equal(ours.cpu().to(theirs.dtype), theirs):
                raise HarvestError(
                    f"{root} was made with another model: layer {site.layer} has another {name}; "
                    "give the model that `lorsa store info` names"
                )
