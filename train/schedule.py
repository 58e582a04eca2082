"""Schedules of a run: learning rate, top_k, and the steps that its minutes hold."""

from .config import TrainConfig
from .extent import Extent


def lr_factor(config: TrainConfig, tokens: float, train_tokens: int) -> float:
    """Return the learning rate as a share of its peak: a rise, a plateau, a linear fall to 0.

    Args:
        config: settings of the run.
        tokens: tokens seen, at the middle of the step.
        train_tokens: tokens of the whole run.
    """
    done = tokens / train_tokens
    rise = (done / config.warmup_frac) if config.warmup_frac > 0 else 1.0
    fall = ((1 - done) / config.decay_frac) if config.decay_frac > 0 else 1.0
    return max(0.0, min(1.0, rise, fall))


def lr_at(config: TrainConfig, span: Extent, tokens: int) -> float:
    """Return the learning rate of a step; the first of a warm-up is above 0.

    Args:
        config: settings of the run.
        span: size of the run.
        tokens: tokens seen before the step.
    """
    return config.lr * lr_factor(config, tokens + span.step_tokens / 2, span.train_tokens)


def top_k_at(config: TrainConfig, tokens: int, train_tokens: int, n_features: int) -> int:
    """Return the features that fire at this point: from top_k_start * top_k down to top_k."""
    if config.top_k_anneal_frac == 0:
        return config.top_k
    left = max(0.0, 1 - tokens / (train_tokens * config.top_k_anneal_frac))
    factor = 1 + (config.top_k_start - 1) * left
    return min(n_features, round(config.top_k * factor))


def steps_in_time(
    config: TrainConfig, span: Extent, *, done: int, left_s: float, step_s: float
) -> int:
    """Return the number of steps of a run that goes on for a time, train_tokens at most.

    Args:
        config: settings of the run.
        span: size of the run.
        done: steps done.
        left_s: seconds that are left.
        step_s: seconds of a step.
    """
    n_steps = done + max(1, int(left_s / step_s))
    if config.train_tokens is not None:
        n_steps = min(n_steps, max(1, config.train_tokens // span.step_tokens))
    return n_steps
