"""Losses, KL and agreement of a language model with sites replaced, token by token.

    KL = sum over tokens v of p(v) (log p(v) - log q(v))      p: the model as it is, q: replaced

A token that p rules out, p(v) = 0, adds nothing. Batches go one by one: first the model as it is,
then every replacement on the same tokens. No more than two batches of logits are in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..language.edit import Gap, Replacement, replaced

FORWARD_TOKENS = 2048
"""Tokens of a forward: logits of a large vocabulary take much memory."""
ROWS = 256
"""Tokens whose logits become float32 probabilities at once."""

Variant = Sequence[tuple[Gap, Replacement]]
"""Places that are filled at once, each with what stands in."""
Name = TypeVar("Name")


class TokenFigures(NamedTuple):
    """Predictions of a model at each token, in figures, each [n, seq]."""

    loss: Tensor
    """Cross-entropy of the next token, nats, float64"""
    kl: Tensor
    """KL divergence of its prediction from the original's, nats, float64"""
    agrees: Tensor
    """Whether the likeliest next token is the original's, bool"""


def batch_seqs(n_ctx: int) -> int:
    """Return how many sequences of n_ctx tokens a forward takes."""
    return max(1, FORWARD_TOKENS // n_ctx)


@torch.inference_mode()
def run_variants(
    model: Any,
    tokens: Tensor,
    variants: Mapping[Name, Variant],
    report: Callable[[int], None] = lambda n_tokens: None,
) -> tuple[TokenFigures, dict[Name, TokenFigures]]:
    """Run a language model as it is and with stand-ins.

    Args:
        model: causal language model of transformers.
        tokens: [n, n_ctx]; the first of a sequence is not predicted.
        variants: stand-ins by any name; where two are at one site, the one that the model comes to
            first changes what the other reads.
        report: called with the number of tokens that are done.

    Returns:
        Figures of [n, n_ctx - 1] tokens, of the model as it is and of the variants by name.
    """
    originals: list[TokenFigures] = []
    found: dict[Name, list[TokenFigures]] = {name: [] for name in variants}
    n_done = 0
    for batch in tokens.long().split(batch_seqs(tokens.shape[1])):
        ids = batch.to(model.device)
        original = logits_of(model, ids)[:, :-1]  # [n, n_ctx - 1, n_vocab]
        originals.append(token_figures(original, original, ids[:, 1:]))
        for name, stand_ins in variants.items():
            with ExitStack() as stack:
                for gap, replacement in sorted(stand_ins, key=lambda each: each[0].depth):
                    stack.enter_context(replaced(gap, replacement))
                logits = logits_of(model, ids)[:, :-1]
            found[name].append(token_figures(logits, original, ids[:, 1:]))
            del logits  # or the next are made beside them
        n_done += batch.numel()
        report(n_done)
    return _joined(originals), {name: _joined(parts) for name, parts in found.items()}


def _joined(parts: list[TokenFigures]) -> TokenFigures:
    return TokenFigures(*(torch.cat(part) for part in zip(*parts, strict=True)))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return a model's logits of whole sequences, [n, seq, n_vocab], in its dtype."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def token_figures(logits: Tensor, original: Tensor, targets: Tensor) -> TokenFigures:
    """Return loss, KL and agreement of every token, on the CPU.

    Args:
        logits, original: [n, seq, n_vocab]; the same tensor gives a KL of 0.
        targets: ids of the next tokens, int64, [n, seq].
    """
    pieces = [
        _figures_of_rows(*rows)
        for sequence in zip(logits, original, targets, strict=True)
        for rows in zip(*(values.split(ROWS) for values in sequence), strict=True)
    ]
    return TokenFigures(
        *(torch.cat(part).view(targets.shape) for part in zip(*pieces, strict=True))
    )


def _figures_of_rows(logits: Tensor, original: Tensor, targets: Tensor) -> TokenFigures:
    log_q = logits.float().log_softmax(dim=1)  # [rows, n_vocab]
    log_p = original.float().log_softmax(dim=1)
    loss = -log_q.gather(1, targets[:, None])[:, 0]
    terms = log_p.exp() * (log_p - log_q)
    terms = terms.masked_fill_(log_p == -torch.inf, 0.0)  # 0 log 0 = 0
    kl = terms.sum(dim=1).clamp(min=0)  # but for rounding it is
    agrees = log_q.argmax(dim=1) == log_p.argmax(dim=1)
    return TokenFigures(loss.double().cpu(), kl.double().cpu(), agrees.cpu())
