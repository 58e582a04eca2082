"""Self-check of what was read off a model: its attention is recomputed and compared.

Each attention module is run once more in float32 on the x that was captured, and its output
compared with the one recomputed from the weights and the geometry that were read:

    error = ||module(x) - attention(x)|| / ||module(x)||      at most LIMIT, for any model
    noise = ||y - module(x)|| / ||module(x)||                 what the model's own precision costs

Both sides are float32, so a model in half precision is checked as strictly as any other. Where a
module can be read in several ways, the first that passes is taken. If none does, the layer's
geometry is unknown: x and y can be harvested all the same, and nothing else is known of it.

What acts rarely (a clamp of queries, say) may leave the first sequences as they are. So those with
the largest activations are compared too, and an input made much smaller and much larger.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LanguageModelError
from .attention import Reading, layer_attention
from .blocks import AttentionSite, float32_copy
from .capture import Call
from .edit import module_output
from .projections import Heads, Unreadable, heads_of
from .readings import readings
from .rotary import Rotary, rotary_of

LIMIT = 1e-4
CHECKED_SEQS = 2
"""Sequences that are compared, the first ones; and as many with the largest inputs."""
PROBES = (1 / 16, 16.0, 256.0)
"""Factors on the input of the first sequence that is compared."""
PROBE_LIMIT = 1e-2
"""Largest error on a probe: scores that are thousands are exact to no more."""


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

    def facts(self) -> dict[str, Any]:
        """Return what the store's manifest says of the check, as JSON-able data."""
        return {
            "passed": self.passed,
            "error": self.error if math.isfinite(self.error) else None,
            "noise": self.noise if math.isfinite(self.noise) else None,
            "reason": self.reason,
        }


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
        return {
            "geometry": None if self.reading is None else self.reading.geometry.to_dict(),
            "heads": {"n_heads": self.heads.n_heads, "d_head": self.heads.d_head},
            "weights": sorted(self.weights),
            "self_check": self.check.facts(),
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
    call = call.of(checked_rows(call.x))
    device = next(site.module.parameters()).device
    x, y = (t.to(device, torch.float32) for t in (call.x, call.y))
    if not (x.isfinite().all() and y.isfinite().all()):
        if not keep_nonfinite:
            raise LanguageModelError(not_finite(site.layer))
        reason = "its activations are not finite"
        return Understood(None, heads, LayerCheck(math.nan, math.nan, finite=False, reason=reason))
    try:
        exact = in_float32(model, site, call, x)
        probes = [_probe(model, site, call.of([0]), x[:1], factor) for factor in PROBES]
    except torch.OutOfMemoryError:
        raise no_memory(x) from None
    except Exception as error:  # a module that needs more of its model than its arguments
        reason = f"its module cannot be run by itself ({type(error).__name__})"
        return _unknown(heads, math.nan, math.nan, reason)
    noise = difference(y, exact)
    try:
        reading, distance, odd = _choose(readings(model, site, call), x, exact, probes)
    except torch.OutOfMemoryError:
        raise no_memory(x) from None
    except Unreadable as error:
        return _unknown(heads, math.nan, noise, str(error))
    except Exception as error:  # attributes of the known names that mean something else
        reason = f"it cannot be read ({type(error).__name__}: {_one_line(error)})"
        return _unknown(heads, math.nan, noise, reason)
    if reading is not None:
        return Understood(reading, heads, LayerCheck(distance, noise))
    where = "" if odd is None else f" on {odd.factor:g} times the input of a sequence"
    reason = (
        f"attention recomputed from what was read of the model differs by {distance:.1e}{where}"
    )
    return _unknown(heads, distance, noise, reason)


class _Choice(NamedTuple):
    reading: Reading | None
    """First reading that gives what the module gives; None if none does"""
    error: float
    """Error on the model's own input; if none passes, the one that says the most"""
    odd: "_Probe | None"
    """Probe on which a reading fails that passes on the model's own input, if none passes"""


def _choose(ways: Iterator[Reading], x: Tensor, exact: Tensor, probes: list["_Probe"]) -> _Choice:
    """Compare readings on the model's own input, and those that pass on the probes."""
    best, odd = math.inf, None
    for reading in ways:
        found = reading_error(reading, x, exact)
        fails = _odd_probe(reading, probes) if found <= LIMIT else None
        if found <= LIMIT and fails is None:
            return _Choice(reading, found, None)
        best, odd = min(best, found), odd or fails
    return _Choice(None, best if odd is None else odd.error, odd)


def checked_rows(x: Tensor) -> list[int]:
    """Return the sequences to compare: the first ones, and those with the largest inputs."""
    largest = largest_tokens(x).topk(min(CHECKED_SEQS, len(x))).indices.tolist()
    return list(dict.fromkeys([*range(min(CHECKED_SEQS, len(x))), *largest]))


def largest_tokens(x: Tensor) -> Tensor:
    """Return the norm of every sequence's largest token, [n]; -1 where one is not finite."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(dim=1)
    return torch.where(norms.isfinite(), norms, -1.0)


class _Probe(NamedTuple):
    """Input that is not the model's own, and what its module gives for it in float32."""

    factor: float
    x: Tensor
    exact: Tensor
    error: float = math.nan
    """Difference of what a reading gives, relative"""


def _probe(model: Any, site: AttentionSite, call: Call, x: Tensor, factor: float) -> _Probe:
    return _Probe(factor, x * factor, in_float32(model, site, call, x * factor))


def _odd_probe(reading: Reading, probes: list[_Probe]) -> _Probe | None:
    """Return the first probe for which a reading gives something else; None if there is none."""
    for probe in probes:
        error = reading_error(reading, probe.x, probe.exact)
        if probe.exact.isfinite().all() and not error <= PROBE_LIMIT:
            return probe._replace(error=error)
    return None


def _unknown(heads: Heads, error: float, noise: float, reason: str) -> Understood:
    return Understood(None, heads, LayerCheck(error, noise, reason=reason))


def reading_error(reading: Reading, x: Tensor, exact: Tensor) -> float:
    """Return by how much a reading's output differs from the exact one, relative to it.

    Args:
        reading: geometry and weights of the layer.
        x, exact: input and output of the layer's module in float32, [n, seq, d_model].
    """
    wide = reading.weights.to(torch.float32)
    return difference(layer_attention(x, wide, reading.geometry), exact)


def difference(found: Tensor, exact: Tensor) -> float:
    """Return the norm of a difference, relative to the exact tensor's."""
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


def require_derivable(check: SelfCheck, *, added: bool = False) -> None:
    """Raise LanguageModelError, naming the first layer whose y cannot be derived, if any.

    Args:
        check: of the layers.
        added: whether they are added to a store that derives.
    """
    for layer, found in check.layers.items():
        if not found.passed:
            raise LanguageModelError(
                f"layer {layer}: its geometry is unknown ({found.reason}), so y cannot be derived; "
                f"{stored_instead(added=added)}"
            )


def stored_instead(*, added: bool) -> str:
    """Return what to do where nothing can be derived, in a new store or one that is there."""
    if added:
        return "this store derives, so harvest it into a new --store, with --outputs store"
    return "give --outputs store"


def not_finite(layer: int) -> str:
    """Return the line that says that a layer's activations are not finite."""
    return (
        f"layer {layer}: its activations are not finite (NaN or Inf from the model); try "
        "--model-dtype float32, check the model with a short prompt, or keep them with "
        "--keep-nonfinite and --outputs store"
    )


def no_memory(x: Tensor) -> LanguageModelError:
    """Return the error of a GPU that does not take the check of x [n, seq, d_model]."""
    return LanguageModelError(
        f"the GPU's memory does not take the self-check of {len(x)} sequences of {x.shape[1]} "
        "tokens in float32: use a smaller --n-ctx, or a larger GPU"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def in_float32(model: Any, site: AttentionSite, call: Call, x: Tensor) -> Tensor:
    """Run a float32 copy of an attention module as it was run before, on another input.

    Args:
        model, site: language model and the layer in it.
        call: how it was run.
        x: input in float32, [n, n_ctx, d_model], of as many sequences.

    Returns:
        The output, [n, n_ctx, d_model].
    """
    return module_output(run_again(float32_copy(site.module), call, x, rotary_of(model, site)))


def run_again(module: Any, call: Call, x: Tensor, rotary: Rotary | None) -> Any:
    """Run a float32 module as a call was run, on another input.

    Args:
        module: a copy of the module that was called.
        call: how it was run.
        x: input in float32, [n, n_ctx, d_model], of as many sequences.
        rotary: what makes its cos and sin, which are made again in float32.

    Returns:
        Whatever the module returns.
    """
    args = [_wide(value) for value in call.args[1:]]
    settings = {name: _wide(value) for name, value in call.kwargs.items()}
    if settings.get("position_embeddings") is not None and rotary is not None:
        settings["position_embeddings"] = rotary.embeddings(x)
    if not call.args:
        settings["hidden_states"] = x
        return module(*args, **settings)
    settings.pop("hidden_states", None)
    return module(x, *args, **settings)


def _wide(value: Any) -> Any:
    """Return an argument of a module, in float32 if it is a floating-point tensor.

    The least number of its precision, by which masks hide keys, becomes that of float32.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    least = torch.finfo(value.dtype).min
    return value.float().masked_fill(value == least, torch.finfo(torch.float32).min)
