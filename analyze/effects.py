"""Effects of features on the next token, and the tokens they read, by the model's own maps."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dictionaries.lorsa.module import Lorsa
from ..language.norms import Language, in_chunks

N_TOKENS = 10
"""Tokens that are listed of a feature."""

Listed = tuple[Tensor, Tensor]
"""Ids, int64, and values, both [n_features, n]; the most extreme first."""


class Effects(NamedTuple):
    """Tokens that each feature affects most, and that it reads most."""

    promoted: Listed
    """Tokens whose logits rise most when it fires with its mean activation, in logits"""
    suppressed: Listed
    """Tokens whose logits fall most, in logits"""
    reads_embedding: Listed
    """Tokens whose embedding its value reads most, in units of v"""


@torch.no_grad()
def effects(lorsa: Lorsa, language: Language, mean_acts: Tensor, n_vocab: int) -> Effects:
    """Return direct effects on the logits, and what is read of the embeddings.

    Args:
        lorsa: on the model's device.
        language: norms and embeddings around its layer.
        mean_acts: mean z of each head where it fires; NaN of those that never did, [n_ov_heads].
        n_vocab: tokens that the tokenizer knows; rows of the embedding beyond are padding.
    """
    n = min(N_TOKENS, n_vocab)
    z = mean_acts.nan_to_num(nan=1.0).float().to(lorsa.W_O.device)
    lists: list[list[Listed]] = [[], [], []]
    embedded = language.embedded()[:n_vocab]
    for rows in in_chunks(len(z), n_vocab):
        logits = language.to_logits(lorsa.W_O[rows] * z[rows, None])[:, :n_vocab]
        for found, sign in zip(lists, (1, -1), strict=False):
            values, ids = (sign * logits).topk(n, dim=1)
            found.append((ids.cpu(), sign * values.cpu()))
        values, ids = (lorsa.W_V[rows] @ embedded.T).topk(n, dim=1)
        lists[2].append((ids.cpu(), values.cpu()))
    return Effects(*((torch.cat([i for i, _ in f]), torch.cat([v for _, v in f])) for f in lists))
