"""Secrets that are cut out of what a server answers, in any spelling."""

import base64
import re
from collections.abc import Iterable

CUT = "[key]"
"""What stands where a secret was."""
FEWEST_ENCODED = 8
"""Characters of an encoded form, below which it may be a word."""
_BETWEEN = r"(?:[^!-~]|\\{1,8}u(?!00[2-7])[0-9a-fA-F]{4}){0,4}"
"""What may stand between two characters: spaces, and what is not seen, escaped or not."""


class Secrets:
    """Secrets to be cut out of texts."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """Prepare for secrets of printable ASCII."""
        forms = [form for secret in secrets for form in _forms(secret)]
        patterns = [_BETWEEN.join(map(_any_spelling, form)) for form in forms]
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def cut(self, text: str) -> str:
        """Return a text with CUT in place of secrets.

        Their characters may be escaped as in JSON, URLs or HTML, or be apart; or the whole is in
        base64 or hexadecimal.
        """
        return text if self._pattern is None else self._pattern.sub(CUT, text)


def _any_spelling(char: str) -> str:
    """Return a pattern of a character's spellings; repeats are bounded, for time's sake."""
    n = ord(char)
    digits = "".join(f"[{d}{d.upper()}]" if d.isalpha() else d for d in f"{n:02x}")
    spellings = (
        rf"\\{{0,8}}{re.escape(char)}",
        rf"\\{{1,8}}(?:u00|x){digits}",
        rf"%(?:25){{0,3}}{digits}",
        rf"&(?:amp;){{0,3}}\#(?:0{{0,6}}{n}|[xX]0{{0,6}}{digits});?",
    )
    return f"(?:{'|'.join(spellings)})"


def _forms(secret: str) -> set[str]:
    """Return a secret, and it in base64 at each place that it may have, and in hexadecimal."""
    data = secret.encode()
    encoded = {data.hex(), data.hex().upper()}
    for shift in range(3):
        padded = bytes(shift) + data
        whole = slice(-(-8 * shift // 6), 8 * len(padded) // 6)  # what nothing else has a part in
        encoded |= {
            base64.b64encode(padded).decode()[whole],
            base64.urlsafe_b64encode(padded).decode()[whole],
        }
    return {secret} | {form for form in encoded if len(form) >= FEWEST_ENCODED}
