"""A request brought together with its store and this machine, before anything is trained."""

from typing import Any, NamedTuple

import torch

from ..dictionaries.lorsa.config import LorsaConfig
from ..errors import TrainError
from ..kernels.dispatch import choose_path
from ..store.read.reader import ActivationStore
from .config import TrainConfig
from .extent import Extent, extent
from .mask import TokenMask
from .report.trackers import require_tracker
from .start import lorsa_config
from .team import Team


class Plan(NamedTuple):
    """A request brought together with its store and this machine."""

    store: ActivationStore
    team: Team
    span: Extent
    shape: LorsaConfig
    mask: TokenMask
    """Which tokens count"""
    low: bool
    """Whether to multiply in bfloat16"""
    facts: dict[str, Any]
    """What the result depends on besides the request"""


def make_plan(config: TrainConfig, store: ActivationStore, team: Team) -> Plan:
    """Bring a request together with its store; nothing is written.

    Args:
        config: the request.
        store: that it names.
        team: who shares each step.

    Raises:
        StoreError: the layer is not stored.
        TrainError: the request does not fit the store or this machine.
    """
    store.require_layer(config.layer)
    if n_bad := store.n_nonfinite(config.layer):
        wide = store.manifest.model.get("dtype") == "float32"
        raise TrainError(
            f"layer {config.layer} of {config.store} holds {n_bad:,} tokens with NaN or Inf, on "
            "which nothing can be trained; "
            + ("the model computed in float32: check its weights, and " if wide else "")
            + "train other --layers"
            + ("" if wide else ", or harvest it with --model-dtype float32 into a new --store")
        )
    span = extent(config, store, team.world)
    low = uses_bfloat16(config, team.device)
    facts = {
        "store_uuid": store.manifest.uuid,
        "d_model": store.manifest.d_model,
        "train_tokens": span.train_tokens,
        "batch_seqs": span.batch_seqs,
        "arithmetic": _arithmetic(low),
    }
    require_tracker(config.tracker)
    mask = TokenMask.of(config.loss_mask, store, config.layer)
    return Plan(store, team, span, lorsa_config(config, store), mask, low, facts)


def _arithmetic(low: bool) -> str:
    return "bfloat16" if low else "float32"


def describe(config: TrainConfig, plan: Plan) -> str:
    """Return in a line what is about to be trained, and on what."""
    shape, device = plan.shape, plan.team.device.type
    path = choose_path(config.backend, device).__name__.rpartition(".")[2].removesuffix("_path")
    where = f"{device}, {_arithmetic(plan.low)}, {path}"
    if plan.team.world > 1:
        where += f", {plan.team.world} processes"
    n_steps = f"{plan.span.n_steps:,}"
    if config.minutes is not None:
        n_steps = f"{config.minutes:g} minutes of"
        if config.train_tokens is not None:
            n_steps = f"at most {plan.span.n_steps:,}, or {n_steps}"
    return (
        f"layer {config.layer}: {shape.n_ov_heads:,} OV heads, {shape.n_qk_heads} QK heads, "
        f"top_k {shape.top_k}; {n_steps} steps of {plan.span.step_tokens:,} tokens "
        f"({where})"
    )


def uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether a run multiplies in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type != "cpu")
