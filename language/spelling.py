"""Token ids as text, one by one."""

import re
from itertools import chain
from typing import Any

_SPACE = "\u2581"
"""Character that stands for a space in a SentencePiece vocabulary."""


MOST_NUMBERS = 1_000_000
"""Numbers that one setting may name; more are a slip, and would fill the memory."""


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token as text; a token that is part of a character, as its bytes: <0xE2>.

    A space at its beginning is kept, though decoders of SentencePiece vocabularies strip it.
    """
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    piece: str | None = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return text
    if "\ufffd" in text:
        return _bytes_of(piece) or text
    return f" {text}" if piece.startswith(_SPACE) and not text.startswith(" ") else text


def printable(text: str) -> str:
    """Return a text of a corpus fit to print: line ends as ↵, no terminal's control characters."""
    return "".join(c if c.isprintable() else f"<{ord(c):02X}>" for c in text.replace("\n", "↵"))


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


def numbers(name: str, text: str) -> list[int]:
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
