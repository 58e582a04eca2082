"""Figures of a language model with sites replaced, ablated and as they are."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import AnalyzeError
from .in_model import TokenFigures


class Replacements(NamedTuple):
    """One figure for each stand-in."""

    replaced: float
    zero_ablated: float
    mean_ablated: float
    random: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """Next-token losses of the language model, nats per token, and the likeness of predictions."""

    original: float
    """Loss of the model as it is."""
    replaced: float
    """Loss with the dictionary's output in place of what it approximates."""
    zero_ablated: float
    """Loss with zero there."""
    mean_ablated: float
    """Loss with the mean over training tokens there."""
    random: float
    """Loss with random features of the same number and L0 there; see random_features.py."""
    increase_se: float | None
    """Standard error of replaced - original, over sequences; None for a single one."""
    kl: Replacements
    """Mean KL(original || replaced) of the next token's distribution, nats."""
    top1_agreement: Replacements
    """Share of tokens whose likeliest next token is the original's."""
    by_position: dict[str, list[float]]
    """Loss of the token after each position, [n_ctx - 1], by the name of each of the losses."""
    n_tokens: int
    """Predicted tokens."""

    @property
    def recovered_from_zero(self) -> float | None:
        """Share of the loss that zero-ablation costs, recovered; None if it costs nothing."""
        return self._recovered(self.zero_ablated)

    @property
    def recovered_from_mean(self) -> float | None:
        """Share of the loss that mean-ablation costs, recovered; None if it costs nothing."""
        return self._recovered(self.mean_ablated)

    def _recovered(self, ablated: float) -> float | None:
        cost = ablated - self.original
        return (ablated - self.replaced) / cost if cost > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-able data, the shares recovered among them."""
        return asdict(self) | {
            "kl": self.kl._asdict(),
            "top1_agreement": self.top1_agreement._asdict(),
            "recovered_from_zero": self.recovered_from_zero,
            "recovered_from_mean": self.recovered_from_mean,
        }


def cross_entropy(figures: Mapping[str, TokenFigures], of: str) -> CrossEntropy:
    """Return the means of token figures.

    Args:
        figures: of original and each of `Replacements`, each of [n, n_ctx - 1] tokens.
        of: the run or runs, for messages.

    Raises:
        AnalyzeError: a loss is not finite.
    """
    for name, one in figures.items():
        if not one.loss.isfinite().all():
            raise AnalyzeError(
                f"{of}: the language model's loss ({name.replace('_', '-')}) is not finite; "
                "check the model with a short prompt, and the run for NaN weights"
            )
    increase = (figures["replaced"].loss - figures["original"].loss).mean(dim=1)
    n_seqs = len(increase)
    losses = {name: one.loss for name, one in figures.items()}
    return CrossEntropy(
        **{name: _mean(loss) for name, loss in losses.items()},
        increase_se=float(increase.std()) / n_seqs**0.5 if n_seqs > 1 else None,
        kl=Replacements(*(_mean(figures[name].kl) for name in Replacements._fields)),
        top1_agreement=Replacements(
            *(_mean(figures[name].agrees.double()) for name in Replacements._fields)
        ),
        by_position={name: loss.mean(dim=0).tolist() for name, loss in losses.items()},
        n_tokens=figures["original"].loss.numel(),
    )


def _mean(values: Tensor) -> float:
    return float(values.mean())
