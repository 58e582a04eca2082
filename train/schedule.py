"""What changes during a run, as functions of the tokens seen."""

from .config import TrainConfig


def lr_factor(config: TrainConfig, tokens: float, train_tokens: int) -> float:
    """Return the learning rate as a share of its peak: a rise, a plateau, a linear fall to 0.

    Args:
        tokens: tokens seen, at the middle of the step.
        train_tokens: tokens of the whole run.
    """
    done = tokens / train_tokens
    rise = (done / config.warmup_frac) if config.warmup_frac > 0 else 1.0
    fall = ((1 - done) / config.decay_frac) if config.decay_frac > 0 else 1.0
    return max(0.0, min(1.0, rise, fall))


def top_k_at(config: TrainConfig, tokens: int, train_tokens: int, n_ov_heads: int) -> int:
    """Return how many heads fire at this point: from top_k_start * top_k linearly down to top_k."""
    if config.top_k_anneal_frac == 0:
        return config.top_k
    left = max(0.0, 1 - tokens / (train_tokens * config.top_k_anneal_frac))
    factor = 1 + (config.top_k_start - 1) * left
    return min(n_ov_heads, round(config.top_k * factor))
