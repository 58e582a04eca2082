"""The base of SAEs and transcoders: features that read one site by a linear map.

    z = W_E (x - c) + b_E,  c = b_O of an SAE, 0 of a transcoder
    acts, ids = z where it is among the top_k of select(z) * ||w_O||, or as activation.py says
    y_hat = acts W_O + b_O (+ W_skip x)

Source: Gao et al. 2024, arXiv:2406.04093, section 2, for the linear map and its top_k. That the
choice is by ||w_O|| too makes it the same whatever the units of an activation are.
"""

import math
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from ..kernels.dispatch import sparse_decode, sparse_topk_linear
from .code import Code, Directions, Input
from .dictionary import Dictionary
from .linear_config import LinearConfig

WRITE_SIZE = 1 / 3
"""Size of a row of W_O as a share of a row of W_E's, near which `balance_` brings it;
docs/recipe.md."""


class LinearDictionary(Dictionary):
    """Dictionary whose features read by W_E x + b_E and write rows of W_O.

    Parameters
    ----------
        W_E, W_O: [n_features, d_model]; b_E: [n_features]; b_O: [d_model]
        log_threshold: [n_features]; see Dictionary
    """

    config: LinearConfig
    W_E: nn.Parameter
    b_E: nn.Parameter

    def candidates(self, x: Input, top_k: int | None) -> Code:
        """Return the features with the largest scores; see `Dictionary.candidates`."""
        assert isinstance(x, Tensor)
        dtype = self.compute_dtype
        read, bias = self.centred(self.as_input(x))
        acts, ids = sparse_topk_linear(
            read.to(dtype),
            self.W_E.to(dtype),
            bias.to(dtype),
            self.score_factors(),
            top_k=self.n_candidates(top_k),
            select=self.config.select,
            backend=self.backend,
        )
        return Code(acts, ids)

    def centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what W_E is applied to, [batch, seq, d_model], and what is added, [n_features]."""
        return x, self.b_E

    def decode(self, acts: Tensor, ids: Tensor, x: Tensor | None = None) -> Tensor:
        """Return y_hat, [batch, seq, d_model]; see `Dictionary.decode`."""
        return self.summed(acts, ids) + self.beside(x)

    def decode_prefixes(self, acts: Tensor, ids: Tensor, x: Tensor | None = None) -> Tensor:
        """Return y_hat of each prefix of the features alone, [n_prefixes, batch, seq, d_model].

        One decode gives what the features between two prefixes write; a prefix is the sum of what
        lies below its end.

        Args:
            acts, ids, x: see `decode`.
        """
        mine = [(a <= ids) & (ids < b) for a, b in pairwise((0, *self.config.prefix_sizes))]
        parts = torch.stack([torch.where(each, acts, 0) for each in mine])
        written = self.summed(parts.flatten(0, 1), ids.repeat(len(mine), 1, 1))
        return written.view(len(mine), *ids.shape[:2], -1).cumsum(dim=0) + self.beside(x)

    def summed(self, acts: Tensor, ids: Tensor) -> Tensor:
        """Return the part of y_hat that features write, [batch, seq, d_model]."""
        dtype = self.compute_dtype
        return sparse_decode(acts.to(dtype), ids, self.W_O.to(dtype), backend=self.backend)

    def beside(self, x: Tensor | None) -> Tensor:
        """Return the part of y_hat that features have none in: b_O, or with it what x adds."""
        return self.b_O

    def rescale_(self, x_scale: float, y_scale: float) -> Self:
        """Change units in place; see `Dictionary.rescale_`."""
        with torch.no_grad():
            self.W_E.div_(x_scale)
            self.W_O.mul_(y_scale)
            self.b_O.mul_(y_scale)
            if self.threshold is not None and self.config.score_by_norm:  # z stays as it is
                self.threshold.mul_(y_scale)
        return self

    def balance_(self) -> Self:
        """Change the unit of the activations so that rows of W_O and of W_E are of like sizes.

        Adam moves every weight by about the learning rate, however large it is, so a matrix of
        small weights learns faster than one of large weights. The unit changes by a power of two:
        y_hat stays as it is to the bit.
        """
        with torch.no_grad():
            reads, writes = (float(w.double().norm(dim=1).mean()) for w in (self.W_E, self.W_O))
            if not (0 < reads < math.inf and 0 < writes < math.inf):
                return self
            unit = 2.0 ** round(math.log2(WRITE_SIZE * reads / writes) / 2)
            self.W_E.div_(unit)
            self.b_E.div_(unit)
            self.W_O.mul_(unit)
            if self.threshold is not None and not self.config.score_by_norm:
                self.threshold.div_(unit)
        return self

    def directions(self, ids: Tensor) -> Directions:
        """Return the rows of W_E and W_O of features."""
        return Directions(self.W_E[ids], self.W_O[ids])
