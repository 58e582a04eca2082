"""Successor heads: those that read an ordinal word and make the next one likelier.

Source: Gould et al. 2023, arXiv:2312.09230.
"""

from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dictionaries.lorsa.module import Lorsa
from ...language.blocks import AttentionSite
from ...language.capture import Capture
from ...language.norms import Language, in_chunks
from .bounds import Sums, lower_bounds

ORDINALS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "0 1 2 3 4 5 6 7 8 9",
)
"""Words in an order that a language model knows."""
LEAST_WORDS, LEAST_CLASSES = 8, 3
"""Words that a head must read to have a score, and classes that they must be of."""


def ordinal_tokens(tokenizer: Any) -> list[list[int]]:
    """Return the classes of ORDINALS as token ids, all with a space before or all without.

    A class ends before the first word that is no single token, and is left out below three words.
    """
    both = [
        [
            _single_tokens(tokenizer, [before + word for word in words.split()])
            for before in (" ", "")
        ]
        for words in ORDINALS
    ]
    longest = [max(ways, key=len) for ways in both]
    return [ids for ids in longest if len(ids) >= 3]


def _single_tokens(tokenizer: Any, words: list[str]) -> list[int]:
    """Return the ids of words up to the first that is more than one token."""
    encoded = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in words)
    return [ids[0] for ids in takewhile(lambda ids: len(ids) == 1, encoded)]


def inputs_at(model: Any, site: AttentionSite, words: list[int], bos: int | None) -> Tensor:
    """Return a layer's input at each word, after BOS or else another word, [n_words, d_model]."""
    rows = [[words[i - 1] if bos is None else bos, word] for i, word in enumerate(words)]
    with Capture(model, [site]) as capture:
        x = capture.calls(torch.tensor(rows))[site.layer].x
    return x[:, 1].float()


class Successors(NamedTuple):
    """Scores of heads as successors, each [n_ov_heads]."""

    score: Tensor
    """Share of the words it reads whose next one it makes likeliest, 0..1; NaN of heads that read
    fewer than LEAST_WORDS of LEAST_CLASSES"""
    low: Tensor
    """Lower bound of the score, over words; NaN as the score is"""
    n_words: Tensor
    """Words that it reads"""
    chance: Tensor
    """Score of a head that makes any word of a class likeliest by chance; NaN as the score is"""


@torch.no_grad()
def successor_scores(
    lorsa: Lorsa,
    language: Language,
    classes: list[list[int]],
    xs: list[Tensor],
    mean_acts: Tensor,
) -> Successors:
    """Return how far each head turns ordinal words into the next one.

    The score is a share of what its value reads of the words of a class: that of the words a for
    which it raises, of all words of the class, the one after a most. A head that writes one
    direction can serve one word of a class; one that reads a single word has 1.00 or 0.00 by
    chance, and none at all here. A word is read if its value, were all attention on it, would make
    the head fire as it does on average.

    Args:
        classes: token ids in order.
        xs: the layer's input at each word of a class, [n_words, d_model] each.
        mean_acts: of each head where it fires on text, NaN where it does not, [n_ov_heads].
    """
    least = mean_acts.to(lorsa.W_V)
    hits, reads, chances, n_classes = [], [], [], torch.zeros_like(least)
    for ids, x in zip(classes, xs, strict=True):
        best = torch.cat(
            [
                language.to_logits(lorsa.W_O[rows])[:, ids].argmax(dim=1)
                for rows in in_chunks(len(least), len(language.unembedding))
            ]
        )  # [n_ov_heads]
        values = (x @ lorsa.W_V.T + lorsa.b_V).relu()[:-1]  # [n_words - 1, n_ov_heads]
        values = torch.where(values >= least, values, 0.0)
        word = torch.arange(len(ids) - 1, device=best.device)[:, None]
        reads.append(values)
        hits.append(values * (best[None] == word + 1))
        chances.append(values / len(ids))
        n_classes += (values > 0).any(dim=0)
    sums = Sums.of(torch.cat(hits).cpu(), torch.cat(reads).cpu())
    enough = (sums.n >= LEAST_WORDS) & (n_classes.cpu() >= LEAST_CLASSES)
    told = (sums.c / sums.o, lower_bounds(sums), torch.cat(chances).sum(dim=0).cpu() / sums.o)
    score, low, chance = (torch.where(enough, each, torch.nan) for each in told)
    return Successors(score, low, sums.n, chance)
