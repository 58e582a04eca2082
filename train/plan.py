"""A request brought together with its store and this machine, before anything is trained."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..kernels import choose_path
from ..model import CheckpointError, LorsaConfig, choose_device
from ..store import ActivationStore
from .config import TrainConfig
from .errors import TrainError
from .setup import Extent, extent, lorsa_config

Result = TypeVar("Result")


class Plan(NamedTuple):
    """A request brought together with its store and this machine."""

    store: ActivationStore
    accelerator: Accelerator
    span: Extent
    shape: LorsaConfig
    low: bool
    """Whether to multiply in bfloat16"""
    facts: dict[str, Any]
    """What the result depends on besides the request"""


def make_plan(config: TrainConfig) -> Plan:
    """Bring a request together with its store; nothing is written.

    Raises:
        StoreError: the store cannot be read.
        TrainError: the request does not fit the store or this machine.
    """
    store = ActivationStore.open(config.store)
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
    accelerator = make_accelerator(config)
    span = extent(config, store, accelerator.num_processes)
    low = uses_bfloat16(config, accelerator.device)
    facts = {
        "store_uuid": store.manifest.uuid,
        "train_tokens": span.train_tokens,
        "batch_seqs": span.batch_seqs,
        "arithmetic": _arithmetic(low),
    }
    return Plan(store, accelerator, span, lorsa_config(config, store), low, facts)


def _arithmetic(low: bool) -> str:
    return "bfloat16" if low else "float32"


def describe(config: TrainConfig, plan: Plan) -> str:
    """Return in a line what is about to be trained, and on what."""
    shape, device = plan.shape, plan.accelerator.device.type
    path = choose_path(config.backend, device).__name__.rpartition(".")[2].removesuffix("_path")
    where = f"{device}, {_arithmetic(plan.low)}, {path}"
    if plan.accelerator.num_processes > 1:
        where += f", {plan.accelerator.num_processes} processes"
    return (
        f"layer {config.layer}: {shape.n_ov_heads:,} OV heads, {shape.n_qk_heads} QK heads, "
        f"top_k {shape.top_k}; {plan.span.n_steps:,} steps of {plan.span.step_tokens:,} tokens "
        f"({where})"
    )


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return accelerate's view of the processes of this run and their devices.

    Raises:
        TrainError: the device is not there, or an earlier call in this process chose another one.
    """
    try:
        device = choose_device(config.device)
        choose_path(config.backend, device)
    except ValueError as error:
        raise TrainError(str(error)) from None
    try:
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
    except ValueError as error:  # this process has begun to train on another device
        raise TrainError(f"device {device}: {error}") from None
    if accelerator.device.type != device:
        raise TrainError(
            f"device is {device}, but accelerate is set to {accelerator.device.type} for this "
            "process; give that device, or start another process"
        )
    return accelerator


def uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether a run multiplies in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type != "cpu")


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do some work on the main process alone; all return its result or raise its error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except (TrainError, CheckpointError, OSError) as error:
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return cast(Result, result)
