"""Random tokens that are repeated once: nothing but the repetition can be matched.

    [BOS] a b c d ... a b c d ...

In the second half, the token before, the earlier copy and the token after that copy are single,
known places, so a head's share of each is no accident. Source: Olsson et al. 2022, In-context
Learning and Induction Heads, whose prefix-matching score uses such text.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...dictionaries.lorsa.module import Lorsa
from ...language.blocks import AttentionSite
from ...language.capture import Capture
from .kinds import Attended

N_SEQS, LONGEST = 24, 256
"""Probe sequences, and tokens of one at most."""
PROBE_SEQS = 8
"""Probe sequences of a forward."""


def probe_tokens(usable: npt.NDArray[np.int64], *, n_ctx: int, bos: int | None) -> Tensor:
    """Return probe sequences, [N_SEQS, at most LONGEST].

    Args:
        usable: token ids to draw from, special tokens left out.
        n_ctx: longest sequence that the model was harvested with.
        bos: id to begin with, None for none.
    """
    rng = np.random.default_rng(0)
    head = [] if bos is None else [bos]
    half = min((min(n_ctx, LONGEST) - len(head)) // 2, len(usable))
    rows = []
    for _ in range(N_SEQS):
        drawn = rng.choice(usable, half, replace=False).tolist()
        rows.append([*head, *drawn, *drawn])
    return torch.tensor(rows)


@torch.no_grad()
def probe(lorsa: Lorsa, model: Any, site: AttentionSite, tokens: Tensor) -> Attended:
    """Return what heads read in probe sequences.

    Args:
        lorsa: on the model's device.
        model, site: language model and the layer in it.
        tokens: [n, seq].
    """
    attended = Attended.none(lorsa.config.n_ov_heads)
    with Capture(model, [site]) as capture:
        for batch in tokens.split(PROBE_SEQS):
            x = capture.calls(batch)[site.layer].x
            attended.add(lorsa, x.float(), batch)
    return attended
