"""Goals of a trace: logits, differences of two logits, or any direction of the last stream."""

import torch
from torch import Tensor

from ...errors import AnalyzeError
from .frozen import Frozen, Goal
from .nodes import NOBODY

N_LOGITS = 10
"""Logits that are traced at most."""
MASS = 0.95
"""Probability that they have together, if so many are enough."""


@torch.no_grad()
def likeliest(frozen: Frozen, *, n: int = N_LOGITS, mass: float = MASS) -> list[Goal]:
    """Return the likeliest next tokens as goals.

    Args:
        frozen: the run.
        n: tokens at most.
        mass: as few as have this probability together.
    """
    found = _probabilities(frozen, last(frozen)).sort(descending=True, stable=True)
    n_enough = int((found.values.cumsum(0) < mass).sum()) + 1
    return [logit(frozen, int(token)) for token in found.indices[: min(n, n_enough)]]


@torch.no_grad()
def logit(frozen: Frozen, token: int, *, position: int | None = None) -> Goal:
    """Return a token's logit less the mean logit as a goal.

    Args:
        frozen: the run.
        token: its id.
        position: token at which the logit is read; None is the last of the prompt.

    Raises:
        AnalyzeError: the id is outside the vocabulary.
    """
    at, out = last(frozen) if position is None else position, frozen.logits
    _require_token(frozen, token)
    bias = 0.0 if out.bias is None else float(out.bias[token] - out.bias.mean())
    goal = vector(
        frozen, out.scale * (out.weight[token] - out.weight.mean(dim=0)), out.scale * bias, at
    )
    return goal._replace(token=token, probability=float(_probabilities(frozen, at)[token]))


@torch.no_grad()
def difference(frozen: Frozen, token: int, other: int, *, position: int | None = None) -> Goal:
    """Return by how much a token's logit is above another's as a goal; see `logit`."""
    at, out = last(frozen) if position is None else position, frozen.logits
    _require_token(frozen, token)
    _require_token(frozen, other)
    bias = 0.0 if out.bias is None else float(out.bias[token] - out.bias[other])
    return vector(frozen, out.scale * (out.weight[token] - out.weight[other]), out.scale * bias, at)


@torch.no_grad()
def vector(frozen: Frozen, direction: Tensor, bias: float = 0.0, position: int = -1) -> Goal:
    """Return a direction of what the unembedding reads as a goal.

    Args:
        frozen: the run.
        direction: [d_model].
        bias: added to what it reads.
        position: token at which it reads; -1 is the last of the prompt.
    """
    at = position % len(frozen.tokens)
    value = float(frozen.read[at] @ direction) + bias
    return Goal(position=at, vector=direction, bias=bias, value=value, token=NOBODY)


def last(frozen: Frozen) -> int:
    """Return the last position of the prompt."""
    return len(frozen.tokens) - 1


def _probabilities(frozen: Frozen, position: int) -> Tensor:
    """Return the probabilities of the tokens after a position, [n_vocab]."""
    logits = frozen.logits.capped(frozen.logits.before_cap(frozen.read[position]))
    return logits.softmax(dim=0)


def _require_token(frozen: Frozen, token: int) -> None:
    if not 0 <= token < (n_vocab := len(frozen.logits.weight)):
        raise AnalyzeError(f"token {token} is outside the vocabulary; it has 0-{n_vocab - 1}")
