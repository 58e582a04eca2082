"""A request for a run: its settings brought together with the store and this machine."""

import math
from typing import Any, NamedTuple

import torch

from ..dictionaries.lorsa.config import LorsaConfig
from ..dictionaries.lorsa.start import require_fit
from ..errors import TrainError
from ..kernels.dispatch import choose_path
from ..language.stored import layer_geometry
from ..sites import attention_ports
from ..store.read.reader import ActivationStore
from .config import TrainConfig
from .extent import Extent, extent
from .mask import TokenMask
from .report.trackers import require_tracker
from .team import Team

QK_HEADS_PER_HEAD = 4
"""QK heads for every head of the layer, where n_qk_heads is not given."""


class Request(NamedTuple):
    """Settings of a run, brought together with its store and this machine."""

    number: int
    """Place among the runs that are trained together, from 0"""
    config: TrainConfig
    store: ActivationStore
    team: Team
    span: Extent
    shape: LorsaConfig
    mask: TokenMask
    """Mask of the tokens that count"""
    low: bool
    """Whether to multiply in bfloat16"""
    facts: dict[str, Any]
    """Facts that the result depends on besides the settings"""


def make_request(
    config: TrainConfig, store: ActivationStore, team: Team, *, number: int = 0
) -> Request:
    """Bring settings together with their store; nothing is written.

    Args:
        config: the settings.
        store: the store that they name.
        team: the processes that share each step.
        number: place among the runs that are trained together.

    Raises:
        StoreError: the layer is not stored.
        TrainError: the settings do not fit the store or this machine.
    """
    sites = attention_ports(config.layer).sites
    store.require_sites(sites)
    if n_bad := sum(map(store.n_nonfinite, sites)):
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
        "d_model": store.width(sites[0]),
        "train_tokens": span.train_tokens,
        "batch_seqs": span.batch_seqs,
        "arithmetic": _arithmetic(low),
    }
    require_tracker(config.tracker)
    mask = TokenMask.of(config.loss_mask, store, config.layer)
    shape = lorsa_config(config, store)
    return Request(number, config, store, team, span, shape, mask, low, facts)


def lorsa_config(config: TrainConfig, store: ActivationStore) -> LorsaConfig:
    """Return the shape of the Lorsa that a run trains.

    Raises:
        TrainError: sizes do not fit each other, or the layer's attention is not understood and
            init is not "random".
    """
    self_check = store.manifest.modules[f"{config.layer}.attention"]["self_check"]
    if config.init != "random" and not self_check["passed"]:
        why = self_check.get("reason") or f"self-check failed, relative error {self_check['error']}"
        raise TrainError(
            f"layer {config.layer} of {store.root} cannot be started from: its geometry is unknown "
            f"({why}); give --init random"
        )
    geometry = layer_geometry(config.layer, store)
    n_qk_heads = config.n_qk_heads or QK_HEADS_PER_HEAD * geometry.n_heads
    wanted = math.ceil(config.expansion * geometry.d_model / n_qk_heads) * n_qk_heads
    try:
        shape = LorsaConfig(
            d_model=geometry.d_model,
            n_qk_heads=n_qk_heads,
            d_qk_head=geometry.d_head,
            n_ov_heads=config.n_ov_heads or wanted,
            top_k=config.top_k,
            scale=geometry.scale,
            select=config.select,
            activation=config.activation,
            max_l0=config.max_l0,
            rope=geometry.rope,
            qk_norm=geometry.qk_norm,
            softcap=geometry.softcap,
            window=geometry.window,
            n_ctx=store.manifest.n_ctx,
            base_model=store.manifest.model.get("id"),
            base_revision=store.manifest.model.get("revision"),
            layer=config.layer,
            store_uuid=store.manifest.uuid,
        )
        if config.init != "random":
            require_fit(shape, geometry)
    except ValueError as error:
        raise TrainError(str(error)) from None
    return shape


def uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Return whether a run multiplies in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type != "cpu")


def _arithmetic(low: bool) -> str:
    return "bfloat16" if low else "float32"


def describe(request: Request) -> str:
    """Return in a line what is about to be trained, and on what."""
    config, shape, span, team = request.config, request.shape, request.span, request.team
    device = team.device.type
    path = choose_path(config.backend, device).__name__.rpartition(".")[2].removesuffix("_path")
    where = f"{device}, {_arithmetic(request.low)}, {path}"
    if team.world > 1:
        where += f", {team.world} processes"
    n_steps = f"{span.n_steps:,}"
    if config.minutes is not None:
        n_steps = f"{config.minutes:g} minutes of"
        if config.train_tokens is not None:
            n_steps = f"at most {span.n_steps:,}, or {n_steps}"
    return (
        f"layer {config.layer}: {shape.n_ov_heads:,} OV heads, {shape.n_qk_heads} QK heads, "
        f"top_k {shape.top_k}; {n_steps} steps of {span.step_tokens:,} tokens ({where})"
    )
