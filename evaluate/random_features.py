"""Random features: what as many directions explain that nobody has trained.

    z_i = <d_i, y - mean(y)>         of n_features directions d_i, uniformly at random, of length 1
    y_hat = mean(y) + c * sum of z_i d_i over the features that fire

The top_k features with the largest z_i fire, or with the largest |z_i| where the dictionary selects
so. They are as many as fire on a token of the dictionary, rounded. The one factor c fits training
tokens by least squares. They read the very y that they approximate, whatever the dictionary reads.
Mean and factor are of tokens whose norm is no outlier (on_store.py), which would lead both.
So they are an SAE of the site that it writes, and what they explain is due to the number of
features and to the choice among them.

Source: Korznikov et al. 2026, arXiv:2602.14111, whose baselines keep an SAE's decoder or encoder at
random values and train the rest; here mean and factor are all that is fitted.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..dictionaries.config import DictionaryConfig
from ..dictionaries.linear_config import SaeConfig
from ..dictionaries.sae import Sae


@torch.no_grad()
def mean_of(outputs: Iterable[Tensor]) -> Tensor:
    """Return the mean of y, [d_model], added up in float64.

    Args:
        outputs: y of some tokens, part by part, each [n, n_ctx, d_model].
    """
    n_tokens, total = 0, torch.zeros((), dtype=torch.float64)
    for y in outputs:
        n_tokens += y.shape[0] * y.shape[1]
        total = total.to(y.device) + y.double().sum(dim=(0, 1))
    return (total / n_tokens).float()


@torch.no_grad()
def random_features(
    config: DictionaryConfig, l0: float, mean: Tensor, outputs: Iterable[Tensor], *, seed: int = 0
) -> Sae:
    """Return random features beside a dictionary.

    Args:
        config: of the dictionary, which says its layer.
        l0: features of it that fire on a token, on average.
        mean: of y, [d_model], on the device of the result.
        outputs: y of the tokens that the factor is fitted to, as of `mean_of`.
        seed: of the directions.
    """
    (site,) = config.ports.writes
    sae = Sae(
        SaeConfig(
            layer=site.layer,
            site=site.name,
            d_model=config.d_model,
            n_features=config.n_features,
            top_k=min(max(round(l0), 1), config.n_features),
            select=config.select,
            score_by_norm=False,
        )
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(config.n_features, config.d_model, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    sae.W_E.copy_(directions)
    sae.W_O.copy_(directions)
    sae = sae.to(mean.device)
    sae.b_O.copy_(mean)
    sae.W_O.mul_(_factor(sae, mean, outputs))
    return sae


def _factor(sae: Sae, mean: Tensor, outputs: Iterable[Tensor]) -> float:
    """Return c, for which c times what the features add is nearest to y - mean(y)."""
    along = square = 0.0
    for y in outputs:
        added = (sae(y) - mean).double()
        along += float((added * (y - mean)).sum())
        square += float(added.square().sum())
    return along / square if square else 0.0
