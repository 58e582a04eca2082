"""Token ids of texts, made in batches that a fast tokenizer shares among the cores.

A document that is longer than PIECE_CHARACTERS is tokenised in pieces. A piece begins at a single
space between words. Byte-level and SentencePiece tokenizers alike begin a new word there, so that
the ids are those of the whole. Only text without such a space is cut elsewhere.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .document import Document, TokenIds

PIECE_CHARACTERS = 250_000
BATCH_CHARACTERS = 1_000_000


class _Piece(NamedTuple):
    name: str
    text: str
    last: bool
    """Whether the piece ends its document"""


def ids_of_texts(docs: Iterable[Document], tokenizer: Any) -> Iterator[tuple[str, TokenIds]]:
    """Yield name and token ids, int64, of documents, without BOS and EOS."""
    keeps_space = _keeps_space(tokenizer)
    pieces = (
        _Piece(doc.name, text, last) for doc in docs for text, last in cut(doc.text, keeps_space)
    )
    parts: list[TokenIds] = []
    for batch in _batches(pieces):
        found = _encode(tokenizer, [piece.text for piece in batch])
        for piece, ids in zip(batch, found, strict=True):
            parts.append(np.array(ids, dtype=np.int64))
            if piece.last:
                yield piece.name, np.concatenate(parts)
                parts = []


def cut(text: str, keeps_space: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text, and whether each is the last.

    Args:
        text: text of any length.
        keeps_space: True: the space between two pieces begins the second; False: it is left out.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end, is_space = _place(text, start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
        yield text[start:end], False
        start = end + (is_space and not keeps_space)
    yield text[start:], True


def _place(text: str, low: int, high: int) -> tuple[int, bool]:
    """Return the last place to cut in text[low:high], and whether it is at a single space."""
    place = text.rfind(" ", low, high)
    while place > low:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place, True
        place = text.rfind(" ", low, place)
    line = text.rfind("\n", low, high) + 1
    return (line or high), False


def _keeps_space(tokenizer: Any) -> bool:
    """Whether the space belongs to the word after it, as in byte-level tokenizers.

    For tokenizers that put a space before any text it has to be left out.
    """
    whole, first, *ways = _encode(tokenizer, ["one two three", "one", " two three", "two three"])
    kept, left_out = (first + rest == whole for rest in ways)
    return kept or not left_out


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Yield batches of pieces of about BATCH_CHARACTERS."""
    batch: list[_Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece.text)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
