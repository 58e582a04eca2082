"""Self-check of what was read off a model: its attention is recomputed and compared.

Each attention module is run once more in float32 on the x that was captured, and its output
compared with the one recomputed from the weights and the geometry that were read:

    error = ||module(x) - attention(x)|| / ||module(x)||      at most LIMIT, for any model
    noise = ||y - module(x)|| / ||module(x)||                 what the model's own precision costs

Both sides are float32, so a model in half precision is checked as strictly as any other. Where a
module can be read in several ways, the first that passes is taken. If none does, the layer's
geometry is unknown: x and y can be harvested all the same, and nothing else is known of it.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LanguageModelError
from ..store.fixed import read_weights as stored_weights
from ..store.manifest import Manifest
from ..store.places import Place
from .attention import LayerWeights, layer_attention
from .blocks import AttentionSite, float32_copy
from .capture import Call
from .edit import module_output
from .readings import Heads, Reading, Unreadable, heads_of, readings, weight_readings
from .rotary import rotary_of

LIMIT = 1e-4
CHECKED_SEQS = 2


class LayerCheck(NamedTuple):
    """Result of the check of one layer."""

    error: float
    """Relative difference of the recomputed output from the module's, both float32; NaN where
    nothing could be compared"""
    noise: float
    """Relative difference of the captured output from the module's in float32"""
    finite: bool = True
    """Whether the first activations were finite; if not, nothing was compared and error is NaN"""
    reason: str | None = None
    """Reason why the layer is not understood; None where it is"""

    @property
    def passed(self) -> bool:
        """Whether the layer is understood."""
        return self.error <= LIMIT


class SelfCheck(NamedTuple):
    """Results of the check of all layers."""

    layers: dict[int, LayerCheck]
    limit: float = LIMIT
    """A layer with a larger error is not understood"""


class Understood(NamedTuple):
    """What is known of one layer."""

    reading: Reading | None
    """Geometry and weights of the layer; None if they are unknown"""
    heads: Heads
    """Sizes of the heads, as the module says"""
    check: LayerCheck

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights of the layer by name; none if they are unknown."""
        return {} if self.reading is None else self.reading.weights.present()

    def facts(self) -> dict[str, Any]:
        """Return what the store's manifest says of the layer, as JSON-able data."""
        check = self.check
        return {
            "geometry": None if self.reading is None else self.reading.geometry.to_dict(),
            "heads": {"n_heads": self.heads.n_heads, "d_head": self.heads.d_head},
            "weights": sorted(self.weights),
            "self_check": {
                "passed": check.passed,
                "error": check.error if math.isfinite(check.error) else None,
                "noise": check.noise if math.isfinite(check.noise) else None,
                "reason": check.reason,
            },
        }


@torch.no_grad()
def understand(
    model: Any, site: AttentionSite, call: Call, *, keep_nonfinite: bool = False
) -> Understood:
    """Find out what a layer computes, by recomputing y from x in float32.

    Args:
        model: the language model.
        site: attention layer of the model.
        call: arguments and output of the layer, from `Capture.calls`.
        keep_nonfinite: whether a layer with NaN or Inf counts as unknown instead of raising.

    Raises:
        LanguageModelError: an activation is not finite.
    """
    heads = heads_of(model, site)
    device = next(site.module.parameters()).device
    x, y = (t[:CHECKED_SEQS].to(device, torch.float32) for t in (call.x, call.y))
    if not (x.isfinite().all() and y.isfinite().all()):
        if not keep_nonfinite:
            raise LanguageModelError(_not_finite(site.layer))
        reason = "its activations are not finite"
        return Understood(None, heads, LayerCheck(math.nan, math.nan, finite=False, reason=reason))
    try:
        exact = _in_float32(model, site, call, x)
    except torch.OutOfMemoryError:
        raise _no_memory(x) from None
    except Exception as error:  # a module that needs more of its model than its arguments
        reason = f"its module cannot be run by itself ({type(error).__name__})"
        return _unknown(heads, math.nan, math.nan, reason)
    noise = _difference(y, exact)
    best = math.inf
    try:
        for reading in readings(model, site):
            found = reading_error(reading, x, exact)
            if found <= LIMIT:
                return Understood(reading, heads, LayerCheck(found, noise))
            best = min(best, found)
    except torch.OutOfMemoryError:
        raise _no_memory(x) from None
    except Unreadable as error:
        return _unknown(heads, math.nan, noise, str(error))
    except Exception as error:  # attributes of the known names that mean something else
        reason = f"it cannot be read ({type(error).__name__}: {_one_line(error)})"
        return _unknown(heads, math.nan, noise, reason)
    reason = f"attention recomputed from what was read of the model differs by {best:.1e}"
    return _unknown(heads, best, noise, reason)


def _unknown(heads: Heads, error: float, noise: float, reason: str) -> Understood:
    return Understood(None, heads, LayerCheck(error, noise, reason=reason))


def reading_error(reading: Reading, x: Tensor, exact: Tensor) -> float:
    """Return by how much a reading's output differs from the exact one, relative to it.

    Args:
        reading: geometry and weights of the layer.
        x, exact: input and output of the layer's module in float32, [n, seq, d_model].
    """
    wide = reading.weights.to(torch.float32)
    return _difference(layer_attention(x, wide, reading.geometry), exact)


def _difference(found: Tensor, exact: Tensor) -> float:
    scale = exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found - exact).norm() / scale)


def require_understood(check: SelfCheck) -> None:
    """Raise LanguageModelError, naming the first layer that is not understood, if any.

    Layers whose activations are not finite, but kept all the same, are passed over.
    """
    for layer, found in check.layers.items():
        if found.finite and not found.passed:
            raise LanguageModelError(
                f"layer {layer}: {found.reason} (allowed {check.limit:.0e}); lorsa does not "
                "understand this model. --no-selfcheck harvests it all the same, for "
                "--init random only"
            )


def require_derivable(check: SelfCheck) -> None:
    """Raise LanguageModelError, naming the first layer whose y cannot be derived, if any."""
    for layer, found in check.layers.items():
        if not found.passed:
            raise LanguageModelError(
                f"layer {layer}: its geometry is unknown ({found.reason}), so y cannot be derived; "
                "give --outputs store"
            )


def _not_finite(layer: int) -> str:
    return (
        f"layer {layer}: its activations are not finite (NaN or Inf from the model); try "
        "--model-dtype float32, check the model with a short prompt, or keep them with "
        "--keep-nonfinite and --outputs store"
    )


def _no_memory(x: Tensor) -> LanguageModelError:
    return LanguageModelError(
        f"the GPU's memory does not take the self-check of {len(x)} sequences of {x.shape[1]} "
        "tokens in float32: use a smaller --n-ctx, or a larger GPU"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _in_float32(model: Any, site: AttentionSite, call: Call, x: Tensor) -> Tensor:
    """Run a float32 copy of an attention module as it was run before, on x [n, seq, d_model]."""
    module = float32_copy(site.module)
    n_called = len(call.x)
    args = [_first_seqs(value, len(x), n_called) for value in call.args[1:]]
    settings = {name: _first_seqs(v, len(x), n_called) for name, v in call.kwargs.items()}
    settings.pop("hidden_states", None)
    rotary = rotary_of(model, site)
    if settings.get("position_embeddings") is not None and rotary is not None:
        settings["position_embeddings"] = rotary.embeddings(x)
    given = (x,) if call.args else ()
    if not given:
        settings["hidden_states"] = x
    return module_output(module(*given, *args, **settings))


def _first_seqs(value: Any, n_seqs: int, n_called: int) -> Any:
    """Return an argument of the module for the first sequences, in float32 if it is floating."""
    if not isinstance(value, Tensor):
        return value
    value = value[:n_seqs] if value.ndim > 1 and len(value) == n_called else value
    return value.float() if value.is_floating_point() else value


def require_same_weights(
    model: Any, sites: list[AttentionSite], root: Place, manifest: Manifest
) -> None:
    """Raise LanguageModelError unless a model's attention weights are those of a store."""
    for site in sites:
        theirs = stored_weights(root, manifest, site.layer)
        if not theirs:
            continue  # its geometry is unknown, so there are none to compare
        try:
            others = [_unlike(mine, theirs) for mine in weight_readings(model, site)]
        except Unreadable:
            others = ["kind of attention"]
        if all(others):
            raise LanguageModelError(
                f"{root} was made with another model: layer {site.layer} has another {others[0]}; "
                "give the model that `lorsa store info` names"
            )


def _unlike(mine: LayerWeights, theirs: dict[str, Tensor]) -> str | None:
    """Return the name of the first weight that differs, None if none does."""
    for name, their in theirs.items():
        our = mine.present().get(name)
        if our is None or not torch.equal(our.cpu().to(their.dtype), their):
            return name
    return None
