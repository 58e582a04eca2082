"""Causal check of types: whether the model copies worse without the heads of one.

    effect = mean over sequences of (loss without the heads - loss), nats per token

The loss is that of the second half of probes, random tokens repeated once, which nothing but
copying can lower. All heads that text and probes call by a type are ablated at once, what the Lorsa
misses of the layer's output kept; then N_DRAWS times as many others, each drawn among those that
write about as much. No head is an other that text or probes give half of the kind, sure or not, for
near-copies of the family copy too. Where the others write less, their effect is taken as that much
larger. A family is verified if its effect lies above theirs:

    low = effect - mean(theirs) - t sqrt((1 + 1 / n) var(theirs) + var(difference) / n_seqs)

t is Student's 95 % quantile with n - 1 degrees of freedom, var(difference) that over sequences of
the effect less the mean of theirs. Induction, duplicate-token and previous-token heads are what
copies repeated text by Olsson et al. 2022, In-context Learning and Induction Heads; of the other
types probes say nothing, and none of them is checked.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...dictionaries.code import Code
from ...dictionaries.lorsa.module import Lorsa
from ...evaluate.in_model import batch_seqs, logits_of
from ...language.blocks import AttentionSite
from ...language.capture import Capture
from ...language.edit import edited
from ...progress import Measured, Report
from .bounds import t_quantile

CHECKED = ("previous_token", "induction", "duplicate_token")
"""Types of which probes can tell."""
N_SEQS = 4
"""Probe sequences that are read."""
N_DRAWS = 6
"""Times that other heads are drawn."""
NEAREST = 20
"""Heads that write about as much as one of the family, of which another is drawn."""
AS_MUCH = 0.5
"""Share of what the family writes that the others must write, or nothing is told."""
LEAST_EFFECT = 0.01
"""Effect above the others', in nats per token, from which on a family is verified."""


class Family(NamedTuple):
    """What the model loses without the heads of a type; nats per token."""

    n_heads: int
    """Heads that text and probes both call so, and that fire on probes"""
    effect: float
    """Rise of the loss without them"""
    low: float
    """Lower bound of how far it lies above that without others"""
    null: list[float]
    """Rises of the loss without as many others, a draw each, as if they wrote as much"""
    writes: float
    """What the others write in all, as a share of what the family writes"""
    verified: bool
    """Whether low is at least LEAST_EFFECT, and the others write at least AS_MUCH"""


class Probed(NamedTuple):
    """Probes as the unchanged model reads them."""

    tokens: Tensor
    """[n_seqs, seq]"""
    code: Code
    """Heads that fire, [n_seqs, seq, slots]"""
    written: NDArray[np.float64]
    """sum |z| ||w_O|| of each head, [n_ov_heads]"""


def verify_families(
    lorsa: Lorsa,
    model: Any,
    site: AttentionSite,
    tokens: Tensor,
    families: dict[str, list[int]],
    alike: dict[str, list[int]],
    report: Report,
) -> dict[str, Family]:
    """Ablate families of heads on probes, and others for comparison.

    Args:
        lorsa: on the model's device.
        model, site: language model and the layer in it.
        tokens: probes, [n, seq].
        families: heads by their type; of types that are not CHECKED none is ablated.
        alike: heads that may be of a type, those of the family among them: they are no others.
        report: called with `Measured`, and may raise to stop.

    Returns:
        Results by type, of those families that fire on probes and have enough others beside them.
    """
    probed = _look(lorsa, model, site, tokens[:N_SEQS])
    groups = {kind: _groups(probed.written, families[kind], alike[kind]) for kind in CHECKED}
    n_passes = 1 + sum(len(heads) for heads in groups.values())
    began, size = time.perf_counter(), probed.tokens.numel()
    done = 0

    def loss_without(heads: Sequence[int]) -> Tensor:
        nonlocal done
        loss = _loss_without(lorsa, model, site, probed, heads)
        done += size
        rate = done / (time.perf_counter() - began)
        report(Measured(done, n_passes * size, "checking types by ablation", rate))
        return loss

    before = loss_without([])
    found = {}
    for kind, drawn in groups.items():
        if drawn:
            effects = torch.stack([loss_without(heads) - before for heads in drawn])
            written = [float(probed.written[heads].sum()) for heads in drawn]
            found[kind] = _family(len(drawn[0]), effects, written)
    return found


def _groups(written: NDArray[np.float64], heads: list[int], alike: list[int]) -> list[list[int]]:
    """Return the heads of a family that fire, and N_DRAWS times as many others; none if too few."""
    family = [head for head in heads if written[head] > 0]
    others = np.setdiff1d(np.flatnonzero(written > 0), alike)
    if not family or len(others) < len(family):
        return []
    rng = np.random.default_rng(0)
    return [family, *(_alike(written, family, others, rng) for _ in range(N_DRAWS))]


def _alike(
    written: NDArray[np.float64],
    family: list[int],
    others: NDArray[np.int64],
    rng: np.random.Generator,
) -> list[int]:
    """Return as many other heads, each drawn of the nearest to one of the family in what it writes.

    Those that write most come first, for there are the fewest like them.
    """
    left, drawn = others.copy(), []
    size = np.log(written, out=np.full_like(written, -np.inf), where=written > 0)
    for head in sorted(family, key=lambda head: -written[head]):
        gap = np.abs(size[left] - size[head])
        n = min(NEAREST, len(left))
        at = rng.choice(np.argpartition(gap, n - 1)[:n])
        drawn.append(int(left[at]))
        left = np.delete(left, at)
    return drawn


def _family(n_heads: int, effects: Tensor, written: list[float]) -> Family:
    """Return the result of a family from the rises of the loss.

    Args:
        n_heads: heads of the family.
        effects: without the family, then without each draw, [1 + n_draws, n_seqs].
        written: what each of these groups writes.
    """
    as_much = torch.tensor([written[0] / each for each in written], dtype=torch.float64)
    effects = effects * as_much[:, None]
    mine, null = effects[0], effects[1:].mean(dim=1)
    difference = mine - effects[1:].mean(dim=0)
    n, n_seqs = len(null), len(mine)
    error = ((1 + 1 / n) * null.var() + difference.var() / n_seqs).sqrt()
    low = float(difference.mean() - t_quantile(torch.tensor(float(n - 1))) * error)
    writes = float(np.mean(written[1:])) / written[0]
    verified = low >= LEAST_EFFECT and writes >= AS_MUCH
    return Family(n_heads, float(mine.mean()), low, null.tolist(), writes, verified)


@torch.inference_mode()
def _look(lorsa: Lorsa, model: Any, site: AttentionSite, tokens: Tensor) -> Probed:
    """Return which heads fire on probes, and how much they write."""
    codes = []
    with Capture(model, [site]) as capture:
        for batch in tokens.split(batch_seqs(tokens.shape[1])):
            x = capture.calls(batch)[site.layer].x
            codes.append(lorsa.encode(x.float()))
    code = Code(*(torch.cat(each) for each in zip(*codes, strict=True)))
    norms = lorsa.W_O.norm(dim=1)
    written = torch.zeros(len(norms), dtype=torch.float64, device=norms.device)
    ids = code.ids.long().flatten()
    written.index_add_(0, ids, (code.acts.flatten().abs() * norms[ids]).double())
    return Probed(tokens, code, written.cpu().numpy())


@torch.inference_mode()
def _loss_without(
    lorsa: Lorsa, model: Any, site: AttentionSite, probed: Probed, heads: Sequence[int]
) -> Tensor:
    """Return the loss of the second half of each sequence without some heads, float64, [n_seqs]."""
    ablated = torch.zeros(lorsa.config.n_ov_heads, dtype=torch.bool, device=lorsa.W_O.device)
    ablated[list(heads)] = True
    size, losses = batch_seqs(probed.tokens.shape[1]), []
    parts = (each.split(size) for each in (probed.tokens, probed.code.acts, probed.code.ids))
    for tokens, acts, ids in zip(*parts, strict=True):
        written = lorsa.decode(acts * ablated[ids.long()], ids) - lorsa.b_O

        def without(_x: Tensor, y: Tensor, written: Tensor = written) -> Tensor:
            return y - written.to(y.dtype)

        with edited(site, without):
            logits = logits_of(model, tokens.to(model.device))
        losses.append(_second_half(logits, tokens.to(model.device)))
    return torch.cat(losses).double().cpu()


def _second_half(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss of tokens that repeat the first half, all but the first of them, [n_seqs]."""
    first = tokens.shape[1] - tokens.shape[1] // 2  # with a BOS before the two halves or without
    rows = zip(logits[:, first:-1], tokens[:, first + 1 :], strict=True)
    return torch.stack([cross_entropy(row.float(), targets) for row, targets in rows])
