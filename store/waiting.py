"""Waits for others, who are named on stderr when they take long."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAY_AFTER_S = 4.0
"""Seconds of a wait before it is named."""
SAY_EVERY_S = 60.0
POLL_S = 0.5
logger = logging.getLogger("lorsa")


class _Wait:
    def __init__(self, what: str, work_s: float) -> None:
        self.what = what
        self.started = time.monotonic()
        self.say_at = self.started + work_s + SAY_AFTER_S


_waits: set[_Wait] = set()
_lock = threading.Lock()
_watcher: threading.Thread | None = None


@contextmanager
def waiting_for(what: str, work_s: float = 0.0) -> Iterator[None]:
    """Name what a block waits for, after SAY_AFTER_S and then every SAY_EVERY_S, until it ends.

    Args:
        what: follows the words "waiting for".
        work_s: seconds that the block takes without any wait.
    """
    global _watcher
    wait = _Wait(what, work_s)
    with _lock:
        _waits.add(wait)
        if _watcher is None:
            _watcher = threading.Thread(target=_watch, name="lorsa-waiting", daemon=True)
            _watcher.start()
    try:
        yield
    finally:
        with _lock:
            _waits.discard(wait)


def _watch() -> None:
    """Name the waits that take long, until there are none."""
    global _watcher
    while True:
        time.sleep(POLL_S)
        now = time.monotonic()
        with _lock:
            if not _waits:
                _watcher = None
                return
            late = [wait for wait in _waits if now >= wait.say_at]
        for wait in late:
            wait.say_at = now + SAY_EVERY_S
            logger.warning("waiting for %s, %.0f s", wait.what, now - wait.started)
