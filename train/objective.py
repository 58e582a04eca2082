"""Objective of a step, as one module for accelerate to wrap.

    loss = mean (y_hat - y)^2 + l0_coefficient * mean over sequences of (L0 / top_k - 1)^2

The first term is the mean over the y_hat of all prefixes where there are some (Matryoshka: Bussmann
et al. 2025, arXiv:2503.17547). The second term is there with jumprelu only. It is a mean over
sequences, as are the thresholds of batchtopk, so that a step may be cut into any number of parts.
All means are over tokens that count: a sequence weighs as many tokens as count in it.

With a kind that bounds errors (SAEs, transcoders), a token longer than LONGEST usual norms adds its
error as if it were that long, whether it counts or not: some tokens of the residual stream are a
hundred times as long as others, which would be all that counts if they did, and nothing would write
them if they did not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dictionaries.dictionary import Dictionary
from ..dictionaries.linear import LinearDictionary

LONGEST = 3.0
"""Norm of y from which on a token's error is made smaller, in sqrt(width), near which the
median of the scaled norms lies; docs/recipe.md."""


class Outcome(NamedTuple):
    """Result of a forward of the objective."""

    loss: Tensor
    """Loss that is minimised: weight times the equation above"""
    error: Tensor
    """weight * mean (y_hat - y)^2 over the tokens that count, all channels and, of a Matryoshka,
    all prefixes; no gradient"""
    acts: Tensor
    """Activations of the features that fired, [batch, seq, slots], without a gradient; 0 where a
    token does not count"""
    ids: Tensor
    """Features that fired, [batch, seq, slots]"""
    edge: Tensor | None
    """Weight * mean of the sequences' smallest scores that were to fire; batchtopk only"""


class Objective(nn.Module):
    """The loss of a dictionary on some sequences."""

    def __init__(
        self, dictionary: Dictionary, *, jump_bandwidth: float = 1.0, l0_coefficient: float = 3.0
    ) -> None:
        """Choose a dictionary; the rest are the settings of jumprelu, as in TrainConfig."""
        super().__init__()
        self.dictionary = dictionary
        self.jump_bandwidth = jump_bandwidth
        self.l0_coefficient = l0_coefficient

    def forward(
        self, x: Tensor, y: Tensor, top_k: int, counted: Tensor | None = None, weight: float = 1.0
    ) -> Outcome:
        """Return the loss.

        Args:
            x, y: what the dictionary reads and should write, scaled, [batch, seq, d_model].
            top_k: features that fire per token in this step, or on average.
            counted: which tokens count, bool, [batch, seq]; None counts all.
            weight: share of these tokens among those of the step, over all processes.
        """
        acts, ids, edges, fires = self.dictionary.fire(
            x, top_k=top_k, counted=counted, bandwidth=self.jump_bandwidth
        )
        hats = self._outputs(acts, ids, x)
        errors = [masked_mean((y_hat - y).square(), counted) for y_hat in hats]
        error = weight * (errors[0] if len(errors) == 1 else torch.stack(errors).mean())
        loss, edge = error, None
        if self.dictionary.bounds_errors:
            loss = weight * torch.stack([_bounded(hat, y, counted) for hat in hats]).mean()
        if fires is not None:
            excess = _l0_of_sequences(fires, counted) / top_k - 1
            loss = loss + self.l0_coefficient * weight * mean_of_sequences(excess.square(), counted)
        if edges is not None:
            edge = weight * mean_of_sequences(edges, counted)
        fired = acts.detach() if counted is None else acts.detach() * counted[..., None]
        return Outcome(loss, error.detach(), fired, ids, edge)

    def _outputs(self, acts: Tensor, ids: Tensor, x: Tensor) -> Sequence[Tensor]:
        """Return y_hat of every prefix of the features, [batch, seq, d_model] each."""
        dictionary = self.dictionary
        if isinstance(dictionary, LinearDictionary) and dictionary.config.prefixes is not None:
            return dictionary.decode_prefixes(acts, ids, x).unbind()
        return [dictionary.decode(acts, ids, x)]


def _l0_of_sequences(fires: Tensor, counted: Tensor | None) -> Tensor:
    """Return the features that fire per token that counts, [batch]; fires [batch, seq, slots]."""
    per_token = fires.sum(dim=2)  # [batch, seq]
    if counted is None:
        return per_token.mean(dim=1)
    return torch.where(counted, per_token, 0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def mean_of_sequences(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean of values [batch], each weighed by its sequence's tokens that count."""
    if counted is None:
        return values.mean()
    n_counted = counted.sum(dim=1)  # [batch]
    weighed = torch.where(n_counted > 0, values, 0) * n_counted
    return weighed.sum() / n_counted.sum().clamp(min=1)


def _bounded(y_hat: Tensor, y: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean error over the tokens that count, in which long tokens are shortened.

    The sum has the long tokens that do not count as well.
    """
    error = (y_hat - y).square().mean(dim=-1)  # [batch, seq]
    bound = LONGEST**2 * y.shape[-1] / y.square().sum(dim=-1)
    if counted is None:
        return (error * bound.clamp(max=1)).mean()
    shares = torch.where(bound < 1, bound, counted)
    return torch.where(shares > 0, error * shares, 0).sum() / counted.sum().clamp(min=1)


def masked_mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean over the tokens that count and all channels; 0 if none counts.

    Args:
        values: [batch, seq, d_model].
        counted: bool, [batch, seq]; None counts all.
    """
    if counted is None:
        return values.mean()
    per_token = values.mean(dim=-1)  # [batch, seq]
    return torch.where(counted, per_token, 0).sum() / counted.sum().clamp(min=1)
