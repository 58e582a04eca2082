"""Effects of features on the next token, and the tokens they read, by the model's own maps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dictionaries.lorsa.module import Lorsa
from ..language.norms import Language, in_chunks
from .chance import RandomLists, unit

N_TOKENS = 10
"""Tokens that are listed of a feature."""


class Listed(NamedTuple):
    """What is listed of each feature, the most extreme first."""

    ids: Tensor
    """Numbers of tokens or features, int64, [n_features, n]"""
    values: Tensor
    """[n_features, n]"""
    z: Tensor
    """Standard deviations by which they go beyond chance, [n_features, n]"""
    list_z: Tensor | None = None
    """The same of each whole list, [n_features]"""


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
    acts = mean_acts.nan_to_num(nan=1.0).float().to(lorsa.W_O.device)
    embedded = language.embedded()[:n_vocab]

    def logits(vectors: Tensor) -> Tensor:
        return language.to_logits(vectors)[:, :n_vocab]

    def values(vectors: Tensor) -> Tensor:
        return vectors @ embedded.T

    promoted, suppressed = _most(logits, lorsa.W_O.float() * acts[:, None], n_vocab, (1, -1))
    (reads,) = _most(values, lorsa.W_V.float(), n_vocab, (1,))
    return Effects(promoted, suppressed, reads)


def _most(
    products: Callable[[Tensor], Tensor], vectors: Tensor, n_vocab: int, signs: tuple[int, ...]
) -> list[Listed]:
    """Return the tokens whose products with vectors are the largest, for each sign.

    The z leaves the mean over all tokens out: what is done to every token is done to none.

    Args:
        products: linear, from vectors [n, d_model] to a value of each token, [n, n_vocab].
        vectors: [n_features, d_model].
        n_vocab: number of tokens.
        signs: 1 for the largest, -1 for the smallest.
    """

    def centred(directions: Tensor) -> Tensor:
        found = products(directions)
        return found - found.mean(dim=1, keepdim=True)

    n, step = min(N_TOKENS, n_vocab), next(in_chunks(len(vectors), n_vocab)).stop
    chance = RandomLists.draw(centred, unit(vectors), n, step)
    found: list[list[Listed]] = [[] for _ in signs]
    for rows in in_chunks(len(vectors), n_vocab):
        every = products(vectors[rows])
        mean = every.mean(dim=1, keepdim=True)
        for sign, lists in zip(signs, found, strict=True):
            values, ids = (sign * every).topk(n, dim=1)
            lengths = vectors[rows].norm(dim=1, keepdim=True)
            z, list_z = chance.score(values - sign * mean, ids, lengths)
            lists.append(Listed(ids.cpu(), sign * values.cpu(), z.cpu(), list_z.cpu()))
    return [Listed(*map(torch.cat, zip(*lists, strict=True))) for lists in found]
