"""Length of a run: steps, tokens, evaluations."""

from typing import NamedTuple

from ..errors import TrainError
from ..store.read.reader import ActivationStore
from .config import TrainConfig

BATCH_SEQS = 4


BATCH_TOKENS = 1024


MAX_DEAD_WINDOW_TOKENS = 10_000_000


STEPS_UNTIL_KNOWN = 1000
"""Of a run by the minute, until its speed is known."""


STATE_BYTES = 16
"""Of a parameter in float32: itself, its gradient, two moments."""


class Extent(NamedTuple):
    """The run in numbers."""

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
    """Of a parameter, on one process"""

    def lasting(self, n_steps: int, config: TrainConfig) -> "Extent":
        """Return the same run with another number of steps."""
        tokens = n_steps * self.step_tokens
        window = config.dead_window_tokens or min(MAX_DEAD_WINDOW_TOKENS, max(1, tokens // 4))
        looks = config.eval_every_tokens or -(-tokens // 4)
        return self._replace(
            n_steps=n_steps,
            train_tokens=tokens,
            dead_window_tokens=window,
            eval_every_steps=-(-looks // self.step_tokens),
        )


def extent(config: TrainConfig, store: ActivationStore, world: int) -> Extent:
    """Return how long a run is, in steps of whole sequences.

    Raises:
        TrainError: the store has too few training sequences for a step.
    """
    n_ctx, n_train = store.manifest.n_ctx, len(store.train_seqs)
    batch_tokens = config.batch_tokens or max(BATCH_TOKENS, BATCH_SEQS * n_ctx)
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
    """Return the parts of a process's share; on every process the same, and no part empty."""
    if config.exact:
        return -(-batch_seqs // world)
    if config.micro_batch_tokens is None:
        return 1
    most = -(-batch_seqs // world)
    wanted = -(-most // max(1, config.micro_batch_tokens // n_ctx))
    return min(wanted, batch_seqs // world)


def _state_bytes(config: TrainConfig, world: int) -> float:
    """Return the bytes that a parameter takes on one process."""
    if config.exact:
        return STATE_BYTES + 8  # a sum in float64
    if config.shard and world > 1:
        return 8 + STATE_BYTES / world  # whole weights and gradients during a step
    return STATE_BYTES
