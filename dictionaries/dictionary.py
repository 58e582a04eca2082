"""What every kind of dictionary has: features of which few fire, and the rules by which they do.

A kind says how it scores its features (`_candidates`) and what they write (`decode`); which of the
candidates fire, in training and after it, is decided here.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activation import above, jump, largest_of_sequences

LEAST_THRESHOLD = 1e-12

Input = Tensor | tuple[Tensor, ...]
"""Activations that a dictionary reads, or what its kind made of them once (`Projected`)."""


class Code(NamedTuple):
    """The features that fire, in as many slots as may: top_k, or max_l0 where top_k is a mean."""

    acts: Tensor
    """Their activations, [batch, seq, slots]; 0 where the slot's feature does not fire"""
    ids: Tensor
    """Their ids, ascending, int32, [batch, seq, slots]"""


class Firing(NamedTuple):
    """The features that fire in training, and what the rule is trained by."""

    acts: Tensor
    """The same as in Code"""
    ids: Tensor
    """The same as in Code"""
    edge: Tensor | None = None
    """Smallest score of a sequence that was to fire, [batch]; batchtopk only"""
    fires: Tensor | None = None
    """1 where a feature fires, else 0, with a gradient; as acts; jumprelu only"""


class Dictionary(nn.Module):
    """Activations as a few features that fire, and other activations from these."""

    config: Any
    """Of the kind; activation, top_k, score_by_norm and has_threshold are read here"""
    W_O: nn.Parameter
    """What features write, [n_features, d_model]"""
    log_threshold: nn.Parameter | None
    """Of a feature's threshold over `threshold`, [n_features]; jumprelu only"""
    threshold: Tensor | None
    """Of the scores, in units of y, []; batchtopk and jumprelu only"""

    @abstractmethod
    def _candidates(self, x: Input, top_k: int | None) -> Code:
        """Return the features with the largest scores: top_k of a token, or all that may fire."""

    @abstractmethod
    def decode(self, acts: Tensor, ids: Tensor) -> Tensor:
        """Return y_hat, [batch, seq, d_model], of acts and ids [batch, seq, slots]."""

    def encode(self, x: Input, *, top_k: int | None = None) -> Code:
        """Return the heads that fire.

        Args:
            x: attention input after the norm, [batch, seq, d_model], of any floating dtype; or
                what `project` makes of it.
            top_k: heads per token, if not the config's (training may start with more); of
                batchtopk, by their mean over each sequence, as in training, and not by the
                threshold; of jumprelu without effect, as the thresholds decide.

        Raises:
            ValueError: x has another shape.
        """
        if self.config.activation == "batchtopk" and top_k is not None:
            firing = self.fire(x, top_k=top_k)
            return Code(firing.acts, firing.ids)
        acts, ids = self._candidates(x, top_k)
        if not self.config.has_threshold:
            scores = self._scores(acts, ids)  # the tokens given are one sequence
            kept, _ = largest_of_sequences(scores.flatten(0, 1)[None], self.config.top_k)
            acts = torch.where(kept.view_as(acts), acts, 0)
        elif self.threshold is not None:
            limit = self.threshold if self.config.activation == "batchtopk" else 1.0
            acts = torch.where(above(self._scores(acts, ids), limit), acts, 0)
        return Code(acts, ids)

    def fire(
        self,
        x: Input,
        *,
        top_k: int,
        counted: Tensor | None = None,
        bandwidth: float = 1.0,
    ) -> Firing:
        """Return the heads that fire in training.

        Args:
            x, top_k: as in `encode`.
            counted: of batchtopk, which tokens count, bool, [batch, seq]; None counts all.
            bandwidth: of jumprelu, see `activation.jump`.
        """
        acts, ids = self._candidates(x, top_k)
        if self.config.activation == "batchtopk":
            scores = self._scores(acts, ids)
            kept, edge = largest_of_sequences(scores, top_k, counted)
            return Firing(torch.where(kept, acts, 0), ids, edge=edge)
        if self.log_threshold is not None:
            per_threshold = self._score_factors()
            jumped = jump(acts, ids, self.log_threshold, per_threshold, bandwidth=bandwidth)
            return Firing(jumped.acts, ids, fires=jumped.fires)
        return Firing(acts, ids)

    def _score_factors(self) -> Tensor:
        """Return what makes a score of z: ||w_O||, of jumprelu over the threshold, [n_ov_heads]."""
        if self.config.score_by_norm:
            factors: Tensor = self.W_O.detach().norm(dim=1)
        else:
            factors = torch.ones_like(self.W_O[:, 0])
        if self.log_threshold is not None and self.threshold is not None:
            factors = factors / (self.threshold * self.log_threshold.detach().exp())
        return factors

    def _scores(self, acts: Tensor, ids: Tensor) -> Tensor:
        """Return the scores of candidates, without a gradient, in fp32."""
        scores: Tensor = acts.detach().float() * self._score_factors()[ids.long()]
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Return y_hat, the layer's approximate output, [batch, seq, d_model].

        Args:
            x: attention input after the norm, [batch, seq, d_model], of any floating dtype.
        """
        return self.decode(*self.encode(x))

    @torch.no_grad()
    def set_threshold(self, x: Tensor) -> None:
        """Set the threshold so that about top_k heads fire on a token of a sample.

        Args:
            x: attention input, [batch, seq, d_model]; the edges of its sequences are averaged.
        """
        if self.threshold is None:
            return
        edges = []
        for sequence in x.split(1):
            scores = self._scores(*self._candidates(sequence, None))
            edges.append(largest_of_sequences(scores, self.config.top_k).edge)
        level = torch.cat(edges).mean()
        if self.log_threshold is not None:
            level = self.threshold * level.clamp(min=LEAST_THRESHOLD)  # it divides the scores
        self.threshold.copy_(level)
        self.config = replace(self.config, has_threshold=True)

    @torch.no_grad()
    def move_threshold(self, edge: Tensor, share: float) -> None:
        """Move the threshold of batchtopk by a share of the way to an edge."""
        assert self.threshold is not None
        self.threshold.lerp_(edge.to(self.threshold), share)
