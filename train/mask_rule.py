"""Rules of loss masks, as settings have them; imports nothing heavy.

rule = "none", or any of these, joined by commas; a token that one of them names does not count
    bos        it is the tokenizer's BOS, wherever it stands
    special    it is any of the tokenizer's special tokens
    first      it stands at position 0 of a sequence
    norm>Nx    its norm at a site that is read or written is above N times the median there, over
               training tokens
"""

import re
from difflib import get_close_matches
from typing import NamedTuple

KINDS = ("bos", "special", "first")
"""Kinds of tokens that a rule may name."""
NORM = re.compile(r"norm>(\d+(?:\.\d+)?)x")


class Rule(NamedTuple):
    """Rule of a loss mask."""

    kinds: frozenset[str] = frozenset()
    """Kinds of tokens that do not count, of KINDS"""
    norm: float | None = None
    """Norm above which tokens do not count, in medians"""

    @property
    def masks(self) -> bool:
        """Whether any token may not count."""
        return bool(self.kinds) or self.norm is not None


def parse_rule(text: str) -> Rule:
    """Return the rule of a loss mask, such as "special,norm>10x".

    Raises:
        ValueError: a word is unknown, or a norm is not above 1.
    """
    kinds, norm = set(), None
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if found := NORM.fullmatch(part):
            norm = float(found[1])
            if norm <= 1:
                raise ValueError(f"loss_mask has {part!r}; allowed: norm above 1x the median")
        elif part in KINDS:
            kinds.add(part)
        elif part != "none" or len(parts) > 1:
            raise ValueError(f"loss_mask has {part!r}; {_near(part)}")
    return Rule(frozenset(kinds), norm)


def _near(part: str) -> str:
    known = ("none", *KINDS, "norm>10x")
    near = get_close_matches(part, known, n=1)
    hint = f"did you mean {near[0]}? " if near and part != "none" else ""
    return f"{hint}allowed: none, or {', '.join(known[1:])} joined by commas"
