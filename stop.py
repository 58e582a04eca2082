"""Ctrl-C and SIGTERM wait until what is being made is whole: a shard, a step; or do not."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SAME_REQUEST_S = 2.0
"""A launcher passes on the Ctrl-C that a terminal has sent already: no second request."""


class Stop:
    """Whether the process was asked to stop."""

    asked = False


@contextmanager
def stop_when_whole(
    *, enabled: bool = True, tell: Callable[[], None] = lambda: None
) -> Iterator[Stop]:
    """Let Ctrl-C and SIGTERM wait for the block to look; a second one does not wait.

    Outside the main thread the signals stay as they are.

    Args:
        enabled: otherwise they stay as they are, too.
        tell: is called at the first.
    """
    stop = Stop()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first = 0.0

    def ask(number: int, _frame: Any) -> None:
        nonlocal first
        if not stop.asked:
            stop.asked, first = True, time.monotonic()
            tell()
        elif time.monotonic() - first > SAME_REQUEST_S:
            for each, handler in before.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt as Ctrl-C does, where nothing is left half-made.

    Outside the main thread it stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
