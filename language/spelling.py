"""Token ids as text, one by one, and characters that lie in several tokens."""

import codecs
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

_OF_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
"""Text of a token that is a part of a character."""

_END_OF_WORD = "</w>"
"""Mark that ends a word in some BPE vocabularies."""

MOST_NUMBERS = 1_000_000
"""Numbers that one setting may name; more are a slip, and would fill the memory."""


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token as it stands within a text; of a part of a character, its bytes as <0xE2>.

    A space before or after it is kept: one that the vocabulary has and a decoder strips
    (SentencePiece), and one that decoders put between words. Marks as WordPiece's ## are left out.
    """
    text = _decoded(tokenizer, [token])
    piece: str | None = tokenizer.convert_ids_to_tokens(token)
    if piece is None or token in tokenizer.all_special_ids:
        return text
    if "\ufffd" in text:
        return _bytes_of(piece) or text
    if piece.endswith(_END_OF_WORD) and not text.endswith(_END_OF_WORD):
        return f"{text} "
    twice = _decoded(tokenizer, [token, token])  # the second stands within a text
    return twice.removeprefix(text) if twice.startswith(text) else text


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return text


def is_piece(text: str) -> bool:
    """Tell whether a token's text, as `token_text` gives it, is a part of a character."""
    return text.startswith("<0x") and _OF_BYTES.fullmatch(text) is not None


def whole_characters(texts: Sequence[str]) -> list[tuple[range, str]]:
    """Return the texts of consecutive tokens, pieces of characters put together.

    Args:
        texts: of the tokens, as `token_text` gives them.

    Returns:
        Places of tokens, and their text: of one token, or of as many as share characters. A piece
        without the others stays as it is.
    """
    found: list[tuple[range, str]] = []
    start = 0
    while start < len(texts):
        stop, text = _characters_from(texts, start)
        found.append((range(start, stop), text))
        start = stop
    return found


def _characters_from(texts: Sequence[str], start: int) -> tuple[int, str]:
    """Return where the characters that begin with a token end, and they themselves."""
    if not is_piece(texts[start]):
        return start + 1, texts[start]
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = ""
    for place in range(start, len(texts)):
        if not is_piece(texts[place]):
            break
        try:
            text += decoder.decode(bytes.fromhex(re.sub("<0x|>", "", texts[place])))
        except UnicodeDecodeError:
            break
        if not decoder.getstate()[0]:  # no character is unfinished
            return place + 1, text
    return start + 1, texts[start]


def _bytes_of(piece: str) -> str | None:
    """Return the bytes that an entry of a vocabulary stands for; None if it stands for none."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return piece
    to_byte = {char: byte for byte, char in _byte_level().items()}
    if any(char not in to_byte for char in piece):
        return None
    return "".join(f"<0x{to_byte[char]:02X}>" for char in piece)


def _byte_level() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary.

    Source: Radford et al. 2019 (GPT-2): printable Latin-1 as it is, the others from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {byte: shifted.get(byte, chr(byte)) for byte in range(256)}


def parse_ids(name: str, text: str) -> list[int]:
    """Return the numbers in a text such as 17,301 or 0-7, in its order.

    Args:
        name: the setting's name, for messages.
        text: numbers and ranges, joined by commas.

    Raises:
        ValueError: it is anything else, nothing, or more than MOST_NUMBERS numbers.
    """
    parts = [re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip()) for part in text.split(",")]
    ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in parts if m is not None]
    if None in parts or not all(ranges):
        raise ValueError(f"{name} is {text!r}; allowed: numbers such as 17,301 or 0-7")
    if (n := sum(map(len, ranges))) > MOST_NUMBERS:
        raise ValueError(f"{name} is {text!r}, {n:,} numbers; allowed: at most {MOST_NUMBERS:,}")
    return list(chain.from_iterable(ranges))
