"""Change single Lorsa heads in the live language model.

    y_new = base + sum_i (z'_i - z_i) w_O[i]        over the heads that are changed

z_i is the activation of head i, 0 where it does not fire. It becomes z'_i: a factor times z_i, or
one value at every token. With error "keep" the base is the layer's own output y, and what the Lorsa
misses of it stays. With "drop" the base is the Lorsa's y_hat.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..dictionaries.attach import stand_in_gap
from ..dictionaries.code import Code
from ..dictionaries.lorsa.module import Lorsa
from ..errors import AnalyzeError
from ..language.blocks import attention_sites
from ..language.edit import edited
from .config import ERRORS

HOWS = ("scale", "set")
"""Whether an activation is multiplied or replaced."""


@contextmanager
def intervene(
    model: Any,
    lorsa: Lorsa,
    layer: int,
    changes: Mapping[int, float],
    *,
    how: str = "scale",
    error: str = "keep",
) -> Iterator[None]:
    """Change heads of a Lorsa in a language model while the block lasts.

    with intervene(model, lorsa, 12, {17: 0.0, 301: 2.0}):     # 17 ablated, 301 doubled
        logits = model(input_ids=ids, use_cache=False).logits

    The model reads whole sequences without padding; a call that goes on from a cache is refused.

    Args:
        model: causal language model of transformers.
        lorsa: a Lorsa of that layer, on the model's device.
        layer: counted from 0.
        changes: factors of activations by head (0 ablates, 1 changes nothing), or their values.
        how: "scale" for factors, "set" for values at every token.
        error: "keep" what the Lorsa misses, or "drop" it: then, without changes, the Lorsa alone
            stands in for the layer.

    Raises:
        ValueError: how or error is none of these.
        AnalyzeError: a head is outside the Lorsa.
        AttachError: the model has another width, or no such layer, or the Lorsa reads something
            else than the layer's input.
    """
    if how not in HOWS or error not in ERRORS:
        raise ValueError(
            f"how is {how!r}, error is {error!r}; allowed: {', '.join(HOWS)}; {', '.join(ERRORS)}"
        )
    require_heads(lorsa, list(changes))
    stand_in_gap(lorsa.config, model, layer)
    (site,) = attention_sites(model, [layer])
    device = lorsa.W_O.device
    heads = torch.tensor(list(changes), dtype=torch.long, device=device)
    numbers = torch.tensor(list(changes.values()), dtype=torch.float32, device=device)

    def edit(x: Tensor, y: Tensor) -> Tensor:
        code = lorsa.encode(x.float())
        z = activations_of(code, heads, lorsa.config.n_ov_heads)
        target = z * numbers if how == "scale" else numbers.expand_as(z)
        base = y.float() if error == "keep" else lorsa.decode(*code)
        return base + (target - z) @ lorsa.W_O[heads]

    with edited(site, edit):
        yield


def activations_of(code: Code, heads: Tensor, n_ov_heads: int) -> Tensor:
    """Return the activations of some heads, 0 where they do not fire.

    Args:
        code: acts and ids, each [batch, seq, slots].
        heads: distinct ids, int64, [n].
        n_ov_heads: heads of the Lorsa.

    Returns:
        [batch, seq, n], in the order of `heads`.
    """
    acts, ids = code
    batch, seq, _slots = acts.shape
    column = torch.full((n_ov_heads,), len(heads), device=heads.device)  # the last: all others
    column[heads] = torch.arange(len(heads), device=heads.device)
    z = acts.new_zeros(batch, seq, len(heads) + 1)
    return z.scatter_add(2, column[ids.long()], acts)[:, :, :-1]


def require_heads(lorsa: Lorsa, heads: list[int]) -> None:
    """Raise AnalyzeError if a head is outside a Lorsa."""
    n_ov_heads = lorsa.config.n_ov_heads
    outside = [head for head in heads if not 0 <= head < n_ov_heads]
    if outside:
        raise AnalyzeError(f"head {outside[0]} is outside the Lorsa; it has 0-{n_ov_heads - 1}")
