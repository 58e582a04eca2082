"""Settings that go with prompts, and which of them a model takes.

They are max_tokens and temperature. A setting that one prompt is refused for is left out of that
prompt. It is left out of all only if several were refused for it, and none was answered with it.
"""

import threading
from collections import Counter
from typing import Any

REFUSED_BY = 3
"""Prompts that are refused for a setting before others go without it."""
OTHER_NAME = {"max_tokens": "max_completion_tokens"}
"""Another name that some models know a setting under."""


class Settings:
    """Settings of all prompts; may be used by several threads at once."""

    def __init__(self, max_tokens: int) -> None:
        """Begin with all of them."""
        self._values: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
        self._taken: set[str] = set()
        self._refused: Counter[str] = Counter()
        self._lock = threading.Lock()

    def of_prompt(self) -> dict[str, Any]:
        """Return what a prompt begins with."""
        with self._lock:
            return dict(self._values)

    def learn(self, sent: dict[str, Any]) -> None:
        """Take what went with a prompt that was answered for what the model takes."""
        with self._lock:
            self._taken |= set(sent)
            for name in [name for name in self._values if name not in self._taken]:
                self._refused[name] += 1
                if self._refused[name] == REFUSED_BY:
                    del self._values[name]
                    other = OTHER_NAME.get(name)
                    self._values |= {other: sent[other]} if other in sent else {}


def without_refused(sent: dict[str, Any], said: str) -> dict[str, Any] | None:
    """Return settings without those that a refusal names; None if it names none of them."""
    refused = [name for name in sent if name in said]
    left = {name: value for name, value in sent.items() if name not in refused}
    for name in refused:
        other = OTHER_NAME.get(name)
        if other is not None and other in said:
            left[other] = sent[name]
    return left if refused else None
