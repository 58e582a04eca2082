"""Random tokens that are repeated once: text in which nothing but the repetition can be matched.

    [BOS] a b c d ... a b c d ...

In the second half the token before, the earlier copy and the one after that copy are single, known
places, so a head's share of each is no accident (Olsson et al. 2022, In-context Learning and
Induction Heads, use such text for their prefix-matching score).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...dictionaries.lorsa.contributions import blocks
from ...dictionaries.lorsa.module import Lorsa
from ...language.blocks import AttentionSite
from ...language.capture import Capture
from .kinds import Reading

N_SEQS = 24
LONGEST = 256
BATCH_SEQS = 8


def probe_tokens(
    usable: npt.NDArray[np.int64], *, n_ctx: int, bos: int | None, seed: int = 0
) -> Tensor:
    """Return probe sequences, [N_SEQS, at most LONGEST].

    Args:
        usable: token ids to draw from, special tokens left out.
        n_ctx: longest sequence that the model was harvested with.
        bos: id to begin with, None for none.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    head = [] if bos is None else [bos]
    half = min((min(n_ctx, LONGEST) - len(head)) // 2, len(usable))
    rows = []
    for _ in range(N_SEQS):
        drawn = rng.choice(usable, half, replace=False).tolist()
        rows.append([*head, *drawn, *drawn])
    return torch.tensor(rows)


@torch.no_grad()
def probe(lorsa: Lorsa, model: Any, site: AttentionSite, tokens: Tensor) -> Reading:
    """Return what heads read on probe sequences.

    Args:
        lorsa: on the model's device.
        model, site: language model and the layer in it.
        tokens: [n, seq].
    """
    reading = Reading.zeros(lorsa.config.n_ov_heads)
    with Capture(model, [site]) as capture:
        for batch in tokens.split(BATCH_SEQS):
            x, _y = capture.run(batch)[site.layer]
            x, batch = x.float(), batch.to(x.device)
            projected = lorsa.project(x)
            acts, ids = lorsa.encode(projected)
            for block in blocks(lorsa, projected, ids):
                reading.add(block, acts, ids, batch)
    return reading
