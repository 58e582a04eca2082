"""Self-check of a block: its sites are recomputed from what was read of the model.

The block is run once more in float32 on the residual stream that was captured, and every site that
follows from another is recomputed from it:

    MLP     mlp_out from mlp_in, there and on inputs made much smaller and much larger
    block   attn_in, resid_mid, mlp_in and resid_out, by its norms and sums

The error of the block is by token, ||found - exact|| / ||exact||, its root mean square: a first
token may be a thousand times as large as the others.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LanguageModelError
from .again import Again
from .block import NORMS, BlockReading, Derivation
from .blocks import Block
from .capture import Call
from .mlp import MlpReading, layer_mlp
from .mlp_readings import mlp_readings
from .norms import Norm
from .projections import Unreadable
from .selfcheck import (
    LIMIT,
    PROBE_LIMIT,
    PROBES,
    LayerCheck,
    checked_rows,
    difference,
    no_memory,
    not_finite,
    stored_instead,
)

FEW_TOKENS = 64
"""Tokens by which the closest reading is chosen."""


class KnownMlp(NamedTuple):
    """What is known of an MLP."""

    reading: MlpReading | None
    """Geometry and weights; None if they are unknown"""
    check: LayerCheck

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights by name; none if they are unknown."""
        return {} if self.reading is None else self.reading.weights.present()

    def facts(self) -> dict[str, Any]:
        """Return what the store's manifest says of the MLP, as JSON-able data."""
        geometry = None if self.reading is None else self.reading.geometry.to_dict()
        return _facts(geometry, self.weights, self.check)


class KnownBlock(NamedTuple):
    """What is known of the sums and norms of a block."""

    block: Block
    reading: BlockReading | None
    """None if they are unknown"""
    check: LayerCheck

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights of the norms by name; none if they are unknown."""
        return {} if self.reading is None else self.reading.weights()

    def facts(self) -> dict[str, Any]:
        """Return what the store's manifest says of the block, as JSON-able data."""
        geometry = None if self.reading is None else self.reading.geometry.to_dict()
        parts = [f"{self.block.layer}.attention", f"{self.block.layer}.mlp"]
        facts = _facts(geometry, self.weights, self.check)
        return {**facts, "parts": parts, "lacks": sorted(self.block.lacks)}


def _facts(
    geometry: dict[str, Any] | None, weights: Mapping[str, Tensor], check: LayerCheck
) -> dict[str, Any]:
    return {"geometry": geometry, "weights": sorted(weights), "self_check": check.facts()}


class BlockChecks(NamedTuple):
    """Results of the check of all layers."""

    mlps: dict[int, LayerCheck]
    blocks: dict[int, LayerCheck]
    limit: float = LIMIT
    """A part with a larger error is not understood"""


class Understanding(NamedTuple):
    """What is known of a layer besides its attention."""

    mlp: KnownMlp | None
    """None where the layer has no MLP that is found"""
    block: KnownBlock


def require_residual(blocks: Mapping[int, LayerCheck]) -> None:
    """Raise LanguageModelError, naming the first layer whose residual stream does not add up.

    Layers whose activations are not finite, but kept all the same, are passed over.
    """
    for layer, found in blocks.items():
        if found.finite and not found.passed:
            raise LanguageModelError(
                f"layer {layer}: its residual stream is not the sum that lorsa knows "
                f"({found.reason}); leave resid out of --sites. --no-selfcheck harvests it all "
                "the same"
            )


def require_derivation(module: str, check: LayerCheck | None, *, added: bool = False) -> None:
    """Raise LanguageModelError unless a module, such as 12.mlp, is understood.

    Args:
        module: name of the module.
        check: of it; None if it is not found.
        added: whether its sites are added to a store that derives.
    """
    if check is None or not check.passed:
        layer, _, kind = module.partition(".")
        reason = "it is not found" if check is None else check.reason
        what = {"mlp": "MLP", "block": "residual stream"}.get(kind, kind)
        raise LanguageModelError(
            f"layer {layer}: the geometry of its {what} is unknown ({reason}), so nothing can be "
            f"derived by it; {stored_instead(added=added)}"
        )


@torch.no_grad()
def understand_block(
    model: Any,
    block: Block,
    call: Call,
    seen: Mapping[str, Tensor],
    *,
    keep_nonfinite: bool = False,
) -> Understanding:
    """Find out what the MLP, the norms and the sums of a layer are.

    Args:
        model: the language model.
        block: the layer.
        call: arguments and output of the block, from `Capture.see`.
        seen: activations of its sites that were captured in the same run, by the site's name.
        keep_nonfinite: whether a layer with NaN or Inf counts as unknown instead of raising.

    Raises:
        LanguageModelError: an activation is not finite.
    """
    rows = checked_rows(call.x)
    call = call.of(rows)
    some = {name: values[rows].float() for name, values in seen.items()}
    if not all(each.isfinite().all() for each in (call.x, call.y, *some.values())):
        if not keep_nonfinite:
            raise LanguageModelError(not_finite(block.layer))
        reason = "its activations are not finite"
        return _unknown(block, LayerCheck(math.nan, math.nan, finite=False, reason=reason))
    again = Again(model, block, call)
    try:
        exact = again.sites()
    except torch.OutOfMemoryError:
        raise no_memory(call.x) from None
    except Exception as error:  # a module that needs more of its model than its arguments
        reason = f"its block cannot be run by itself ({type(error).__name__})"
        return _unknown(block, LayerCheck(math.nan, math.nan, reason=reason))
    noise = {n: difference(v.to(exact[n].device), exact[n]) for n, v in some.items() if n in exact}
    mlp = None if block.mlp is None else _mlp(model, block, again, exact, noise)
    return Understanding(mlp, understand_sums(model, block, exact, noise))


def _unknown(block: Block, check: LayerCheck) -> Understanding:
    return Understanding(
        None if block.mlp is None else KnownMlp(None, check), KnownBlock(block, None, check)
    )


def _mlp(
    model: Any, block: Block, again: Again, exact: Mapping[str, Tensor], noise: Mapping[str, float]
) -> KnownMlp:
    """Read an MLP and compare it with its module."""
    lost = noise.get("mlp_out", math.nan)
    x, y = exact["mlp_in"], exact["mlp_out"]
    few, want = (each.flatten(0, 1)[:FEW_TOKENS] for each in (x, y))
    try:
        readings = [
            MlpReading(one.geometry, one.weights.to(torch.float32))
            for one in mlp_readings(model, block)
        ]
    except Unreadable as error:
        return KnownMlp(None, LayerCheck(math.nan, lost, reason=str(error)))
    best = min(readings, key=lambda one: _error(one, few, want))
    found = _error(best, x, y)
    if not found <= LIMIT:
        reason = f"an MLP recomputed from what was read of the model differs by {found:.1e}"
        return KnownMlp(None, LayerCheck(found, lost, reason=reason))
    for factor in PROBES:
        other = again.sites(x * factor)["mlp_out"]
        if other.isfinite().all() and not (off := _error(best, x * factor, other)) <= PROBE_LIMIT:
            reason = (
                "an MLP recomputed from what was read of the model differs by "
                f"{off:.1e} on {factor:g} times its input"
            )
            return KnownMlp(None, LayerCheck(off, lost, reason=reason))
    dtype = next(model.get_submodule(block.parts[-1]).parameters()).dtype
    return KnownMlp(MlpReading(best.geometry, best.weights.to(dtype)), LayerCheck(found, lost))


def _error(reading: MlpReading, x: Tensor, exact: Tensor) -> float:
    error = difference(layer_mlp(x, reading.weights, reading.geometry), exact)
    return math.inf if math.isnan(error) else error


def understand_sums(
    model: Any, block: Block, exact: Mapping[str, Tensor], noise: Mapping[str, float]
) -> KnownBlock:
    """Read the norms and the sums of a block and compare them with what it computes.

    Args:
        model: the language model.
        block: the layer.
        exact: its sites by name, [n, n_ctx, d_model], in float32.
        noise: by how much the model's own precision changes them, for the record.
    """
    lost = max(noise.values(), default=math.nan)
    for name in ("attn_out", "mlp_out"):
        if name not in exact:
            reason = f"its {name} is not there: {block.lacks[name]}"
            return KnownBlock(block, None, LayerCheck(math.nan, lost, reason=reason))
    try:
        readings = list(_block_readings(model, block))
    except LanguageModelError as error:
        return KnownBlock(block, None, LayerCheck(math.nan, lost, reason=str(error)))
    errors = [block_error(reading, exact) for reading in readings]
    site, found = min(errors, key=lambda each: each[1])
    if not found <= LIMIT:
        reason = f"{site} recomputed from the other sites of its layer differs by {found:.1e}"
        return KnownBlock(block, None, LayerCheck(found, lost, reason=reason))
    return KnownBlock(block, readings[errors.index((site, found))], LayerCheck(found, lost))


def _block_readings(model: Any, block: Block) -> Iterator[BlockReading]:
    """Yield every way in which the sums of a block may be understood."""
    text = model.config.get_text_config()
    named = {n: model.get_submodule(at) for n, at in block.norms._asdict().items() if at}
    norms = {name: Norm.read(named[name], text.hidden_size) for name in NORMS if name in named}
    said = (
        getattr(holder, "residual_multiplier", None)
        for holder in (model.get_submodule(block.name), text)
    )
    multipliers = [1.0, *(float(each) for each in said if isinstance(each, float | int))]
    for multiplier in dict.fromkeys(multipliers):
        yield BlockReading.of(
            text.hidden_size, is_parallel=block.is_parallel, multiplier=multiplier, norms=norms
        )


def block_error(reading: BlockReading, exact: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return the site that a block's norms and sums give worst, and by how much it differs.

    Args:
        reading: norms and sums of the block.
        exact: its sites by name, [n, n_ctx, d_model], in float32; each is recomputed from the
            others as they are here.
    """
    worst = ("", 0.0)
    for name in (each for each in ("attn_in", "resid_mid", "mlp_in", "resid_out") if each in exact):
        others = {site: values for site, values in exact.items() if site != name}
        found = Derivation(others, block=reading).site(name)
        error = difference_by_token(found, exact[name])
        if not error <= worst[1]:
            worst = (name, error)
    return worst


def difference_by_token(found: Tensor, exact: Tensor) -> float:
    """Return the root mean square over tokens of the relative difference, for [..., width]."""
    scale = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((found - exact).norm(dim=-1) / scale).square().mean().sqrt())
