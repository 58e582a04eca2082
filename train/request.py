"""A request for a run: its settings brought together with the store and this machine."""

from typing import Any, NamedTuple

import torch

from ..dictionaries.config import DictionaryConfig
from ..errors import TrainError
from ..kernels.dispatch import choose_path
from ..store.read.reader import ActivationStore
from .config import TrainConfig
from .extent import Extent, extent
from .mask import TokenMask
from .report.trackers import require_tracker
from .shape import shape_of
from .team import Team


class Request(NamedTuple):
    """Settings of a run, brought together with its store and this machine."""

    number: int
    """Place among the runs that are trained together, from 0"""
    config: TrainConfig
    store: ActivationStore
    team: Team
    span: Extent
    shape: DictionaryConfig
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
        StoreError: the store lacks a site; the message says how to add it.
        TrainError: the settings do not fit the store or this machine.
    """
    sites = config.ports.sites
    store.require_sites(sites)
    if n_bad := sum(map(store.n_nonfinite, sites)):
        wide = store.manifest.model.get("dtype") == "float32"
        raise TrainError(
            f"{config.label} of {config.store} holds {n_bad:,} tokens with NaN or Inf, on "
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
    mask = TokenMask.of(config.loss_mask, store, sites)
    shape = shape_of(config, store)
    return Request(number, config, store, team, span, shape, mask, low, facts)


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
    steps = f"{n_steps} steps of {span.step_tokens:,} tokens"
    return f"{shape.sizes}, top_k {shape.top_k}; {steps} ({where})"
