"""Ctrl-C and SIGTERM that wait until what is being written is whole, or end it at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SAME_REQUEST_S = 2.0
"""Time within which a second signal is the same request: launchers pass on a terminal's Ctrl-C."""


class Stop:
    """Whether the process was asked to stop."""

    asked = False


@contextmanager
def stop_when_whole(
    *, enabled: bool = True, on_first: Callable[[], None] = lambda: None
) -> Iterator[Stop]:
    """Let Ctrl-C and SIGTERM set `Stop.asked`, which the block reads; a second one does not wait.

    Outside the main thread the signals stay as they are.

    Args:
        enabled: if False, they stay as they are, too.
        on_first: is called at the first signal.
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
            on_first()
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
    """Let SIGTERM raise KeyboardInterrupt as Ctrl-C does, for work that leaves nothing partial.

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
