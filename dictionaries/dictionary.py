"""The base of every kind of dictionary: features of which few fire, and which of them do.

A kind says which features may fire (`candidates`) and what they write (`decode`). Which of the
candidates do fire, in training and after it, is decided here.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activation import above, batch_top_k, jump

LEAST_THRESHOLD = 1e-12
"""Threshold of jumprelu at least, in units of the scores: it divides them."""

Input = Tensor | tuple[Tensor, ...]
"""Activations that a dictionary reads, or what its kind has made of them (`Projected`)."""


class Code(NamedTuple):
    """The features that fire, in as many slots as may: top_k, or max_l0 where top_k is a mean."""

    acts: Tensor
    """Activations, [batch, seq, slots]; 0 where the slot's feature does not fire"""
    ids: Tensor
    """Ids of the features, ascending, int32, [batch, seq, slots]"""


class Firing(NamedTuple):
    """The features that fire in training, and what their thresholds are trained by."""

    acts: Tensor
    """Activations, as in Code"""
    ids: Tensor
    """Ids of the features, as in Code"""
    edge: Tensor | None = None
    """Smallest score of a sequence that was to fire, [batch]; batchtopk only"""
    fires: Tensor | None = None
    """1 where a feature fires, else 0, [batch, seq, slots], with a gradient; jumprelu only"""


class Dictionary(nn.Module, ABC):
    """A module that encodes activations as a few features that fire, and decodes these."""

    config: Any
    """Settings of its kind; activation, top_k, score_by_norm and has_threshold are read here"""
    W_O: nn.Parameter
    """Directions that features write, [n_features, d_model]"""
    log_threshold: nn.Parameter | None
    """Logarithm of each feature's threshold over `threshold`, [n_features]; jumprelu only"""
    threshold: Tensor | None
    """Threshold of the scores, in units of y, []; batchtopk and jumprelu only"""

    @abstractmethod
    def candidates(self, x: Input, top_k: int | None) -> Code:
        """Return the features with the largest scores.

        Args:
            x: activations that it reads, [batch, seq, d_model], or what its kind made of them.
            top_k: features per token, if not the config's; without effect where top_k is a mean,
                for then the max_l0 that may fire are returned.

        Raises:
            ValueError: x has another shape.
        """

    @abstractmethod
    def decode(self, acts: Tensor, ids: Tensor) -> Tensor:
        """Return y_hat, [batch, seq, d_model], of acts and ids [batch, seq, slots]."""

    def encode(self, x: Input, *, top_k: int | None = None) -> Code:
        """Return the features that fire.

        Args:
            x: activations that it reads, [batch, seq, d_model], of any floating dtype; or what its
                kind made of them. A Lorsa reads the attention input after the norm.
            top_k: features per token, if not the config's (training may start with more). With
                batchtopk it is their mean over each sequence, as in training, and the threshold
                does not count. With jumprelu it has no effect: the thresholds decide.

        Raises:
            ValueError: x has another shape.
        """
        if self.config.activation == "batchtopk" and top_k is not None:
            firing = self.fire(x, top_k=top_k)
            return Code(firing.acts, firing.ids)
        acts, ids = self.candidates(x, top_k)
        if not self.config.has_threshold:
            scores = self._scores(acts, ids)  # the tokens given are one sequence
            fires, _ = batch_top_k(scores.flatten(0, 1)[None], self.config.top_k)
            acts = torch.where(fires.view_as(acts), acts, 0)
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
        """Return the features that fire in training.

        Args:
            x, top_k: see `encode`.
            counted: which tokens count with batchtopk, bool, [batch, seq]; None counts all.
            bandwidth: width of jumprelu's rectangle; see `activation.jump`.

        Raises:
            ValueError: x has another shape.
        """
        acts, ids = self.candidates(x, top_k)
        if self.config.activation == "batchtopk":
            scores = self._scores(acts, ids)
            fires, edge = batch_top_k(scores, top_k, counted)
            return Firing(torch.where(fires, acts, 0), ids, edge=edge)
        if self.log_threshold is not None:
            factors = self.score_factors()
            jumped = jump(acts, ids, self.log_threshold, factors, bandwidth=bandwidth)
            return Firing(jumped.acts, ids, fires=jumped.fires)
        return Firing(acts, ids)

    def score_factors(self) -> Tensor:
        """Return the factor that makes a score of each feature's activation, [n_features].

        It is ||w_O||, or 1 without `score_by_norm`; with jumprelu, divided by the threshold.
        """
        if self.config.score_by_norm:
            factors: Tensor = self.W_O.detach().norm(dim=1)
        else:
            factors = torch.ones_like(self.W_O[:, 0])
        if self.log_threshold is not None and self.threshold is not None:
            factors = factors / (self.threshold * self.log_threshold.detach().exp())
        return factors

    def _scores(self, acts: Tensor, ids: Tensor) -> Tensor:
        """Return the scores of candidates, without a gradient, in fp32."""
        scores: Tensor = acts.detach().float() * self.score_factors()[ids.long()]
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Return y_hat, the approximate output, [batch, seq, d_model].

        Args:
            x: activations that it reads, [batch, seq, d_model], of any floating dtype.

        Raises:
            ValueError: x has another shape.
        """
        return self.decode(*self.encode(x))

    @torch.no_grad()
    def set_threshold(self, x: Tensor) -> None:
        """Set the threshold so that about top_k features fire on a token of a sample.

        Args:
            x: activations that it reads, [batch, seq, d_model]; the edges of the sequences are
                averaged.
        """
        if self.threshold is None:
            return
        edges = []
        for sequence in x.split(1):
            scores = self._scores(*self.candidates(sequence, None))
            edges.append(batch_top_k(scores, self.config.top_k).edge)
        level = torch.cat(edges).mean()
        if self.log_threshold is not None:
            level = self.threshold * level.clamp(min=LEAST_THRESHOLD)
        self.threshold.copy_(level)
        self.config = replace(self.config, has_threshold=True)

    @torch.no_grad()
    def move_threshold(self, edge: Tensor, share: float) -> None:
        """Move the threshold of batchtopk by a share of the way to an edge, []."""
        assert self.threshold is not None
        self.threshold.lerp_(edge.to(self.threshold), share)
