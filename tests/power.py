"""The power goes at a chosen change of the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "truncate", "fsync")


class PowerCutError(BaseException):
    """Nothing reaches the disk any more, whatever cleans up."""


@contextmanager
def power_cut(at: int) -> Iterator[None]:
    """Let the change of the disk with this number, and all that follow, raise."""
    n_changes = 0

    def dying(real: Any) -> Any:
        def change(*args: Any, **named: Any) -> Any:
            nonlocal n_changes
            n_changes += 1
            if n_changes >= at:
                raise PowerCutError
            return real(*args, **named)

        return change

    patches = [patch.object(os, name, dying(getattr(os, name))) for name in CHANGES]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
