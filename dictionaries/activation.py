"""The rules by which candidates fire where top_k is a mean over tokens: batchtopk, jumprelu.

The kernels give the max_l0 best candidates of a token; here some of them are chosen by

    batchtopk   s = z ||w_O||                 s > threshold, one for all features
    jumprelu    s = z ||w_O|| / threshold_i   s > 1,  threshold_i = threshold exp(log_threshold_i)

where z is a feature's activation and w_O what it writes.

To train batchtopk, the n top_k largest s of every sequence of n tokens fire instead, and threshold
follows the smallest of them. The batch is the sequence so that a step may be cut into any number
of processes and parts. To train jumprelu, log_threshold gets the gradient of a rectangle in place
of the steps' own, which is zero or infinite:

    d acts_i / d log_threshold_i  = -threshold_i / ||w_O|| / bandwidth
    d [s > 1] / d log_threshold_i = -1 / bandwidth                where |s - 1| < bandwidth / 2

Sources: Bussmann et al. 2024, arXiv:2412.06410 (batchtopk); Rajamanoharan et al. 2024,
arXiv:2407.14435, equations 11 and 12 (jumprelu; their bandwidth is threshold_i * ours). Scores that
are NaN fire, so that nothing hides them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_L0_FACTOR = 4
"""Features that may fire on a token at most, as a multiple of their mean, by default."""


def above(scores: Tensor, threshold: Tensor | float) -> Tensor:
    """Return where scores are above a threshold, or NaN; bool."""
    return ~(scores <= threshold)


class BatchTopK(NamedTuple):
    """Which candidates of some sequences fire."""

    fires: Tensor
    """Whether a candidate fires, bool, [batch, seq, max_l0]"""
    edge: Tensor
    """Smallest score that was to fire, [batch]; inf where no token counts"""


def batch_top_k(scores: Tensor, top_k: int, counted: Tensor | None = None) -> BatchTopK:
    """Let the n * top_k largest scores of every sequence of n tokens that count fire.

    Of equal scores the lowest token's and id's fire. On the tokens that do not count, those above
    the edge fire.

    Args:
        scores: candidates' scores, ids ascending, [batch, seq, max_l0].
        top_k: features that fire per token on average.
        counted: which tokens count, bool, [batch, seq]; None counts all.
    """
    batch, seq, max_l0 = scores.shape
    flat = scores.reshape(batch, -1)  # [batch, seq * max_l0]
    if counted is None:
        n_kept = min(top_k, max_l0) * seq
        edge = flat.kthvalue(flat.shape[1] - n_kept + 1).values
        room = torch.full((batch, 1), n_kept, device=scores.device)
        mine = torch.ones_like(flat, dtype=torch.bool)
    else:
        mine = counted[..., None].expand_as(scores).reshape(batch, -1)
        room = min(top_k, max_l0) * counted.sum(dim=1, keepdim=True)  # [batch, 1]
        ranked = flat.masked_fill(~mine, float("-inf")).sort(dim=1, descending=True).values
        edge = ranked.gather(1, (room - 1).clamp(min=0))[:, 0]
        edge = torch.where(room[:, 0] > 0, edge, float("inf"))
    over = above(flat, edge[:, None])
    tied = mine & (flat == edge[:, None])
    room = room - (over & mine).sum(dim=1, keepdim=True)
    return BatchTopK((over | (tied & (tied.cumsum(dim=1) <= room))).view_as(scores), edge)


class Jumped(NamedTuple):
    """The candidates above their threshold, with a gradient for the thresholds."""

    acts: Tensor
    """z where a feature fires, else 0, [batch, seq, max_l0]"""
    fires: Tensor
    """1 where it fires, else 0, fp32, [batch, seq, max_l0]"""


def jump(
    acts: Tensor, ids: Tensor, log_threshold: Tensor, factors: Tensor, *, bandwidth: float
) -> Jumped:
    """Let the candidates above their threshold fire, so that the thresholds can be trained.

    Args:
        acts, ids: candidates, [batch, seq, max_l0].
        log_threshold: gets the gradient, [n_features].
        factors: ||w_O|| / threshold_i, [n_features]; gets none.
        bandwidth: width of the rectangle as a share of the threshold, above 0 and below 2.
    """
    return Jumped(*_Jump.apply(acts, ids, log_threshold, factors.detach(), bandwidth))


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: Tensor,
        ids: Tensor,
        log_threshold: Tensor,
        factors: Tensor,
        bandwidth: float,
    ) -> tuple[Tensor, Tensor]:
        fires = above(acts.float() * factors[ids.long()], 1.0)
        ctx.save_for_backward(acts, ids, factors)
        ctx.bandwidth = bandwidth
        return torch.where(fires, acts, 0), fires.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, ids, factors = ctx.saved_tensors
        d_acts, d_fires = grads
        scale = factors[ids.long()]
        scores = acts.float() * scale
        near = (scores - 1).abs() < ctx.bandwidth / 2  # scale > 0 there
        slope = d_acts.float()[near] / scale[near] + d_fires.float()[near]
        d_log = sum_by_feature(ids[near], slope, len(factors)) / -ctx.bandwidth
        return torch.where(above(scores, 1.0), d_acts, 0), None, d_log, None, None


def sum_by_feature(ids: Tensor, values: Tensor, n_features: int) -> Tensor:
    """Return the sum of values [n] by their features' ids [n], [n_features]; in a fixed order."""
    if ids.device.type == "cpu":
        return ids.bincount(values, minlength=n_features).to(values.dtype)  # a GPU's order varies
    order = ids.argsort(stable=True)
    count = ids.long().bincount(minlength=n_features)
    return F.embedding_bag(order, values[:, None], count.cumsum(0) - count, mode="sum")[:, 0]
