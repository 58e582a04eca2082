"""Quality of a dictionary on stored outputs: over all tokens, by position and by feature.

    FVU    = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2       one mean over all tokens
    NMSE   = mean over tokens of ||y - y_hat||^2 / ||y||^2     every token counts alike
    cosine = mean over tokens of <y, y_hat> / (||y|| ||y_hat||)
    L0     = mean over tokens of the number of features that fire

By position, the sums and means run over the tokens of one position, with the same mean(y). The FVU
of all tokens is the mean of the positions', weighted by `variance`. Tokens with y = 0 count in
neither NMSE nor cosine. FVU is measured without tokens of outlier norm too, which may hold nearly
all of the variance: those whose y is longer than OUTLIER medians of the training tokens.

Source of NMSE: Gao et al. 2024, arXiv:2406.04093, code (normalized_mean_squared_error).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dictionaries.dictionary import Dictionary
from ..dictionaries.metrics import FVU, firing_counts
from ..store.read.stored import Activations
from ..whole import finite

OUTLIER = 10.0
"""Norm of y from which a token is an outlier, in medians, as norm>10x of a loss mask"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ByPosition:
    """Measures of the tokens at each position of a sequence, [n_ctx]; None where undefined."""

    fvu: list[float | None]
    """Fraction of variance unexplained."""
    nmse: list[float | None]
    """Normalised mean squared error."""
    cosine: list[float | None]
    """Mean cosine of y and y_hat."""
    l0: list[float | None]
    """Features that fire per token."""
    variance: list[float | None]
    """Mean of ||y - mean(y)||^2: the weight of the position in the FVU of all tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequencyHistogram:
    """Numbers of features by how often they fire, in decades of the share of tokens."""

    log10_from: list[int]
    """Lower edge of each decade, -1 for 0.1 up to all tokens, ascending."""
    n_features: list[int]
    """Features in each decade."""
    n_silent: int
    """Features that fire on no token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreQuality:
    """Measures over all tokens, NaN where undefined, from `measure`."""

    fvu: float
    """Fraction of variance unexplained."""
    fvu_usual: float
    """The same over tokens whose norm is no outlier."""
    outlier_fraction: float
    """Share of the tokens whose norm is one."""
    nmse: float
    """Normalised mean squared error."""
    cosine: float
    """Mean cosine of y and y_hat."""
    l0: float
    """Features that fire per token."""
    dead_fraction: float
    """Share of features that fire on none of these tokens."""
    n_tokens: int
    frequency_histogram: FrequencyHistogram
    by_position: ByPosition

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as JSON-able data, None where undefined."""
        found: dict[str, Any] = finite(asdict(self))
        return found


class PositionSums:
    """Sums over the tokens of each position, in float64."""

    def __init__(self, n_ctx: int, d_model: int, device: torch.device) -> None:
        self.n_seqs = 0
        zeros = torch.zeros(n_ctx, dtype=torch.float64, device=device)
        self.residual, self.square, self.fired = zeros.clone(), zeros.clone(), zeros.clone()
        self.nmse, self.cosine, self.n_nonzero = zeros.clone(), zeros.clone(), zeros.clone()
        self.y = zeros.new_zeros(n_ctx, d_model)

    def update(self, y: Tensor, y_hat: Tensor, acts: Tensor) -> None:
        """Add sequences: y, y_hat [batch, n_ctx, d_model], acts [batch, n_ctx, slots]."""
        y, y_hat = y.double(), y_hat.double()
        residual = (y - y_hat).square().sum(dim=2)  # [batch, n_ctx]
        square = y.square().sum(dim=2)
        counts = square != 0  # NaN counts, so that nothing hides it
        self.n_seqs += len(y)
        self.y += y.sum(dim=0)
        self.residual += residual.sum(dim=0)
        self.square += square.sum(dim=0)
        self.fired += (acts != 0).sum(dim=(0, 2))
        self.n_nonzero += counts.sum(dim=0)
        self.nmse += torch.where(counts, residual / square, 0).sum(dim=0)
        cosine = F.cosine_similarity(y, y_hat, dim=2)
        self.cosine += torch.where(counts, cosine, 0).sum(dim=0)

    def by_position(self) -> ByPosition:
        """Return the measures of every position."""
        mean = self.y.mean(dim=0) / max(self.n_seqs, 1)
        variance = self.square - 2 * self.y @ mean + self.n_seqs * mean.square().sum()
        found = {
            "fvu": torch.where(variance > 0, self.residual / variance, torch.nan),
            "nmse": self.nmse / self.n_nonzero,
            "cosine": self.cosine / self.n_nonzero,
            "l0": self.fired / self.n_seqs,
            "variance": variance.clamp(min=0) / self.n_seqs,
        }
        return ByPosition(**finite({name: values.tolist() for name, values in found.items()}))


@torch.no_grad()
def measure(
    dictionary: Dictionary,
    batches: Iterable[Activations],
    n_ctx: int,
    report: Callable[[int], None] = lambda n_tokens: None,
    *,
    longest: float = math.inf,
) -> StoreQuality:
    """Measure a dictionary on batches of what it reads and what it should write.

    Args:
        dictionary: on the device of the batches.
        batches: x and y, each [batch, n_ctx, d_model].
        n_ctx: tokens of a sequence.
        report: called with the number of tokens that are done.
        longest: norm of y above which a token is an outlier.
    """
    n_features = dictionary.config.n_features
    usual, outliers = FVU(), FVU()
    sums = PositionSums(n_ctx, dictionary.config.d_model, dictionary.W_O.device)
    firing = torch.zeros(n_features, dtype=torch.int64)
    for x, y in batches:
        acts, ids = dictionary.encode(x)
        y_hat = dictionary.decode(acts, ids, x)
        is_outlier = y.float().norm(dim=2) > longest  # NaN is none, so that nothing hides it
        usual.update(y[~is_outlier], y_hat[~is_outlier])
        outliers.update(y[is_outlier], y_hat[is_outlier])
        sums.update(y, y_hat, acts)
        firing += firing_counts(acts, ids, n_features).cpu()
        report(usual.n_tokens + outliers.n_tokens)
    fvu = replace(usual)
    fvu.add(outliers)
    n_nonzero = float(sums.n_nonzero.sum())
    return StoreQuality(
        fvu=fvu.value,
        fvu_usual=usual.value,
        outlier_fraction=outliers.n_tokens / max(fvu.n_tokens, 1),
        nmse=float(sums.nmse.sum()) / n_nonzero if n_nonzero else math.nan,
        cosine=float(sums.cosine.sum()) / n_nonzero if n_nonzero else math.nan,
        l0=float(firing.sum()) / max(fvu.n_tokens, 1),
        dead_fraction=float((firing == 0).double().mean()),
        n_tokens=fvu.n_tokens,
        frequency_histogram=frequency_histogram(firing, fvu.n_tokens),
        by_position=sums.by_position(),
    )


def frequency_histogram(firing: Tensor, n_tokens: int) -> FrequencyHistogram:
    """Count features by the decade of their firing frequency.

    Args:
        firing: tokens on which each feature fired, int64, [n_features].
        n_tokens: all tokens.
    """
    n_decades = len(str(n_tokens - 1)) if n_tokens > 1 else 1  # the rarest fire once in n_tokens
    decades = range(-n_decades, 0)
    least = [-(-n_tokens // 10**-decade) for decade in decades]  # tokens, in integers: exact
    bins = torch.bucketize(firing, torch.tensor(least), right=True).bincount(
        minlength=n_decades + 1
    )
    return FrequencyHistogram(
        log10_from=list(decades), n_features=bins[1:].tolist(), n_silent=int(bins[0])
    )
