"""Size of a run: its steps, tokens and evals, and what it needs of a device's memory."""

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import psutil
import torch

from ..dictionaries.config import DictionaryConfig
from ..errors import TrainError
from ..store.read.reader import ActivationStore
from .config import TrainConfig

STEP_SEQS = 4
"""Sequences in a step, where batch_tokens is not given."""
LEAST_STEP_TOKENS = 1024
"""Fewest tokens in a step, where batch_tokens is not given."""
MAX_DEAD_WINDOW_TOKENS = 10_000_000
STEPS_UNTIL_KNOWN = 1000
"""Steps of a run by the minute, until its speed is known."""
STATE_BYTES = 16
"""Bytes of a parameter in float32: itself, its gradient, two moments."""
SPARE = 0.92
"""Share of the free memory that runs may take: allocators keep some."""
SHARED_BYTES = 300_000_000
"""Bytes that a process takes besides its runs: batches read ahead, kernels' scratch."""


class Extent(NamedTuple):
    """Size of a run in numbers."""

    batch_seqs: int
    """Sequences in a step, over all processes"""
    step_tokens: int
    """Tokens in a step"""
    n_micro: int
    """Parts in which a process computes its share of a step"""
    n_steps: int
    train_tokens: int
    dead_window_tokens: int
    eval_every_steps: int
    state_bytes: float = STATE_BYTES
    """Bytes of a parameter on one process, with gradient and moments"""

    def lasting(self, n_steps: int, config: TrainConfig) -> "Extent":
        """Return the size of the same run with another number of steps."""
        tokens = n_steps * self.step_tokens
        window = config.dead_window_tokens or min(MAX_DEAD_WINDOW_TOKENS, max(1, tokens // 4))
        eval_tokens = config.eval_every_tokens or -(-tokens // 4)
        return self._replace(
            n_steps=n_steps,
            train_tokens=tokens,
            dead_window_tokens=window,
            eval_every_steps=-(-eval_tokens // self.step_tokens),
        )


def extent(config: TrainConfig, store: ActivationStore, world: int) -> Extent:
    """Return the size of a run, in steps of whole sequences.

    Raises:
        TrainError: the store has too few training sequences for a step.
    """
    n_ctx, n_train = store.manifest.n_ctx, len(store.train_seqs)
    batch_tokens = config.batch_tokens or max(LEAST_STEP_TOKENS, STEP_SEQS * n_ctx)
    batch_seqs = max(1, batch_tokens // n_ctx)
    if batch_seqs < world:
        raise TrainError(
            f"a step takes {batch_seqs} sequences of {n_ctx} tokens, which is less than one for "
            f"each of {world} processes; use --batch-tokens {world * n_ctx} or more"
        )
    if n_train < world:
        raise TrainError(
            f"{store.root} has {n_train} training sequences for {world} processes; harvest more"
        )
    if n_train < batch_seqs:
        raise TrainError(
            f"{store.root} has {n_train} training sequences of {n_ctx} tokens, a step takes "
            f"{batch_seqs}; use --batch-tokens {n_train * n_ctx} or less"
        )
    step_tokens = batch_seqs * n_ctx
    train_tokens = config.train_tokens or n_train * n_ctx
    n_micro, state_bytes = _n_micro(config, batch_seqs, world, n_ctx), _state_bytes(config, world)
    whole = Extent(batch_seqs, step_tokens, n_micro, 0, 0, 0, 0, state_bytes)
    n_steps = max(1, train_tokens // step_tokens)
    if config.minutes is not None and config.train_tokens is None:
        n_steps = max(n_steps, STEPS_UNTIL_KNOWN)
    return whole.lasting(n_steps, config)


def _n_micro(config: TrainConfig, batch_seqs: int, world: int, n_ctx: int) -> int:
    """Return the parts of a process's share: on every process as many, and none empty."""
    if config.exact:
        return -(-batch_seqs // world)
    if config.micro_batch_tokens is None:
        return 1
    most = -(-batch_seqs // world)
    wanted = -(-most // max(1, config.micro_batch_tokens // n_ctx))
    return min(wanted, batch_seqs // world)


def _state_bytes(config: TrainConfig, world: int) -> float:
    """Return the bytes of a parameter on one process, with gradient and moments."""
    if config.exact:
        return STATE_BYTES + 8  # a sum in float64
    if config.shard and world > 1:
        return 8 + STATE_BYTES / world  # whole weights and gradients during a step
    return STATE_BYTES


def _n_params(shape: DictionaryConfig) -> int:
    """Return the number of parameters of a dictionary."""
    return sum(math.prod(sizes) for sizes in shape.parameter_shapes().values())


def run_bytes(shape: DictionaryConfig, span: Extent, world: int) -> int:
    """Return about how many bytes a run needs on a device: its state and a forward and backward.

    Args:
        shape: shape of the dictionary.
        span: size of the run.
        world: processes that share each step.
    """
    n_seqs = -(-span.batch_seqs // (world * span.n_micro))
    tokens = n_seqs * (span.step_tokens // span.batch_seqs)
    return int(span.state_bytes * _n_params(shape)) + tokens * shape.token_bytes()


def free_memory_bytes(device: torch.device) -> int:
    """Return the free bytes of a device's memory; on a CPU, this process's share of them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # they share it
    return int(psutil.virtual_memory().available) // n_here


def require_room(shape: DictionaryConfig, span: Extent, *, world: int, free: int) -> None:
    """Raise TrainError if a run does not fit the device; the message names what does.

    Args:
        shape, span, world: as in `run_bytes`.
        free: free bytes of the device's memory.
    """
    needed = run_bytes(shape, span, world) + SHARED_BYTES
    if needed <= free * SPARE:
        return
    raise TrainError(
        f"a run with {shape.sizes} needs about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are "
        f"free; {_what_fits(shape, span, world, free)}"
    )


def _what_fits(shape: DictionaryConfig, span: Extent, world: int, free: int) -> str:
    n_ctx = span.step_tokens // span.batch_seqs
    room = free * SPARE - SHARED_BYTES
    least = span._replace(n_micro=-(-span.batch_seqs // world))
    if run_bytes(shape, least, world) <= room:
        n_seqs = 1
        while run_bytes(shape, _in_parts_of(span, 2 * n_seqs, world), world) <= room:
            n_seqs *= 2
        return f"what fits: --micro-batch-tokens {n_seqs * n_ctx}"
    for smaller in _smaller(shape):
        if run_bytes(smaller, least, world) <= room:
            option = f"--{shape.features.replace('_', '-')} {smaller.n_features}"
            return f"what fits: {option} --micro-batch-tokens {n_ctx}"
    return "nothing smaller fits either; free some memory"


def _in_parts_of(span: Extent, n_seqs: int, world: int) -> Extent:
    return span._replace(n_micro=max(1, -(-span.batch_seqs // world) // n_seqs))


def _smaller(shape: DictionaryConfig) -> Iterator[DictionaryConfig]:
    """Yield the same shape with ever fewer features, as far as it goes."""
    multiple = getattr(shape, "n_qk_heads", 1)
    n_features = shape.n_features // 2 // multiple * multiple
    while n_features:
        try:
            yield shape.from_dict(shape.to_dict() | {shape.features: n_features})
        except ValueError:
            return
        n_features = n_features // 2 // multiple * multiple
