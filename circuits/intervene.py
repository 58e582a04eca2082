"""Change single features of a dictionary in the live language model.

    y_new = base + sum_i (z'_i - z_i) w_O[i]        over the features that are changed

z_i is the activation of feature i, 0 where it does not fire. It becomes z'_i: a factor times z_i,
or one value at every token. With error "keep" the base is the model's own y, and what the
dictionary misses of it stays. With "drop" the base is the dictionary's y_hat.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..dictionaries.attach import stand_in_gap
from ..dictionaries.code import Code
from ..dictionaries.dictionary import Dictionary
from ..errors import AnalyzeError
from ..language.edit import edited
from .config import ERRORS

HOWS = ("scale", "set")
"""Whether an activation is multiplied or replaced."""


@contextmanager
def intervene(
    model: Any,
    dictionary: Dictionary,
    layer: int,
    changes: Mapping[int, float],
    *,
    how: str = "scale",
    error: str = "keep",
) -> Iterator[None]:
    """Change features of a dictionary in a language model while the block lasts.

    with intervene(model, lorsa, 12, {17: 0.0, 301: 2.0}):     # 17 ablated, 301 doubled
        logits = model(input_ids=ids, use_cache=False).logits

    With a Lorsa the model reads whole sequences without padding; a call that goes on from a cache
    is refused.

    Args:
        model: causal language model of transformers.
        dictionary: of any kind, on the model's device.
        layer: at which it lies, counted from 0.
        changes: factors of activations by feature (0 ablates, 1 changes nothing), or their values.
        how: "scale" for factors, "set" for values at every token.
        error: "keep" what the dictionary misses, or "drop" it: then, without changes, it alone
            stands in.

    Raises:
        ValueError: how or error is none of these.
        AnalyzeError: a feature is outside the dictionary.
        AttachError: the model has another width, or no such layer or site, or the dictionary reads
            something else than its site.
    """
    if how not in HOWS or error not in ERRORS:
        raise ValueError(
            f"how is {how!r}, error is {error!r}; allowed: {', '.join(HOWS)}; {', '.join(ERRORS)}"
        )
    require_features(dictionary, list(changes))
    gap = stand_in_gap(dictionary.config, model, layer)
    device = dictionary.W_O.device
    features = torch.tensor(list(changes), dtype=torch.long, device=device)
    numbers = torch.tensor(list(changes.values()), dtype=torch.float32, device=device)

    def edit(x: Tensor, y: Tensor) -> Tensor:
        code = dictionary.encode(x.float())
        z = activations_of(code, features, dictionary.config.n_features)
        target = z * numbers if how == "scale" else numbers.expand_as(z)
        base = y.float() if error == "keep" else dictionary.decode(*code, x.float())
        return base + (target - z) @ dictionary.W_O[features].float()

    with edited(gap, edit):
        yield


def activations_of(code: Code, features: Tensor, n_features: int) -> Tensor:
    """Return the activations of some features, 0 where they do not fire.

    Args:
        code: acts and ids, each [batch, seq, slots].
        features: distinct ids, int64, [n].
        n_features: of the dictionary.

    Returns:
        [batch, seq, n], in the order of `features`.
    """
    acts, ids = code
    batch, seq, _slots = acts.shape
    column = torch.full((n_features,), len(features), device=features.device)  # last: all others
    column[features] = torch.arange(len(features), device=features.device)
    z = acts.new_zeros(batch, seq, len(features) + 1)
    return z.scatter_add(2, column[ids.long()], acts)[:, :, :-1]


def require_features(dictionary: Dictionary, features: list[int]) -> None:
    """Raise AnalyzeError if a feature is outside a dictionary."""
    config = dictionary.config
    outside = [feature for feature in features if not 0 <= feature < config.n_features]
    if outside:
        raise AnalyzeError(
            f"{config.unit} {outside[0]} is outside the {config.noun}; it has "
            f"0-{config.n_features - 1}"
        )
