"""Encodings that a text has or seems to have, told by its bytes."""

import re
from contextlib import suppress
from functools import cache

SAMPLE_BYTES = 1 << 16
"""Bytes of a text that its encoding is guessed from."""
SURE = 0.8
"""Least share of usual characters among those beyond ASCII."""
_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_CYRILLIC = "".join(map(chr, (*range(0x430, 0x460), *range(0x490, 0x494))))
_RANGES = {
    "EUC-KR": (0xAC00, 0xD7A4),
    "WINDOWS-1253": (0x3AC, 0x3CF),
    "WINDOWS-1255": (0x5D0, 0x5EB),
    "WINDOWS-1256": (0x621, 0x653),
    "TIS-620": (0xE01, 0xE5C),
}
"""Letters of the languages of an encoding: first, and one past the last."""
_LETTERS = {
    "WINDOWS-1251": _CYRILLIC,
    "KOI8-R": _CYRILLIC,
    "WINDOWS-1252": "àáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿßœÉÀÜÖÄ«»’“”–—…°",  # noqa: RUF001
    "WINDOWS-1250": "áâäçéëíîóôöúüýßąćčďęěĺľłńňőŕřśšťůűźżžăşţ„”",
}
_KANA = frozenset(map(chr, range(0x3041, 0x30FF)))
_HAN = frozenset(map(chr, range(0x4E00, 0x9FB0)))
_ROWS = {"GB18030": ("gb2312", 0xB0, 0xD8), "BIG5": ("big5", 0xA4, 0xC7)}
"""Codec and first bytes of the usual characters of Chinese encodings."""
_LATIN = ("WINDOWS-1252", "WINDOWS-1250")
_MULTIBYTE = ("EUC-KR", "EUC-JP", "SHIFT_JIS", "GB18030", "BIG5")
_IN_LATIN_WORDS = re.compile(rb"[A-Za-z][\x80-\xff]|[\x80-\xff][A-Za-z]")
_CJK_MARKS = frozenset("，。、；：？！“”‘’（）《》「」『』—…ー・")  # noqa: RUF001
_TRIED = (
    *_MULTIBYTE,
    *("WINDOWS-1255", "WINDOWS-1251", "KOI8-R", "WINDOWS-1253", "WINDOWS-1256", "TIS-620"),
    *_LATIN,
)
"""Encodings in the order in which they win when several fit as well."""


def wide_encoding(head: bytes) -> str | None:
    """Return the codec of a text in UTF-16 or UTF-32, None for any other.

    Args:
        head: the first bytes, which begin with a mark, or have a NUL in most pairs.
    """
    for mark, codec in _MARKS.items():
        if head.startswith(mark):
            return codec
    even, odd = head[::2].count(0), head[1::2].count(0)
    most = len(head) // 4
    if len(head) < 8 or min(even, odd) or max(even, odd) <= most:
        return None
    return "utf-16-be" if even else "utf-16-le"


def guess_encoding(raw: bytes) -> str | None:
    """Return the encoding that a text seems to have, by a name that iconv knows.

    None if it is UTF-8, or looks like none.
    """
    with suppress(UnicodeDecodeError):
        raw.decode()
        return None
    sample = raw[:SAMPLE_BYTES]
    n_beyond = len(sample) - len(sample.translate(None, bytes(range(0x80, 0x100))))
    in_latin = 2 * len(_IN_LATIN_WORDS.findall(sample)) > n_beyond
    tried = [name for name in _TRIED if name in _MULTIBYTE or (name in _LATIN) == in_latin]
    shares = {name: _usual_share(sample, name) for name in tried}
    best = max(tried, key=lambda name: shares[name])
    return best if shares[best] >= SURE else None


def _usual_share(sample: bytes, name: str) -> float:
    """Return the share of an encoding's usual characters among those beyond ASCII; 0 if unfit."""
    for end in range(len(sample), len(sample) - 4, -1):  # the last character may be cut
        try:
            text = sample[:end].decode(name)
        except UnicodeDecodeError:
            continue
        beyond = [char for char in text if char > "\x7f"]
        if name in ("EUC-JP", "SHIFT_JIS"):  # Japanese has kana, Chinese has none
            n_kana = sum(char in _KANA for char in beyond)
            beyond = beyond if 5 * n_kana > len(beyond) else []
        usual = _usual(name)
        return sum(char in usual for char in beyond) / max(1, len(beyond))
    return 0.0


@cache
def _usual(name: str) -> frozenset[str]:
    """Return the characters that most text in an encoding is made of, beyond ASCII."""
    if name in _RANGES:
        return frozenset(map(chr, range(*_RANGES[name])))
    if name in _LETTERS:
        return frozenset(_LETTERS[name])
    if name in _ROWS:
        codec, first, end = _ROWS[name]
        pairs = (bytes((high, low)) for high in range(first, end) for low in range(0x40, 0xFF))
        return frozenset(pair.decode(codec, "ignore") for pair in pairs) | _CJK_MARKS
    return _KANA | _HAN | _CJK_MARKS
