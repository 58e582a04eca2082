"""Files that stay open for the next read, and are let go where too many are open."""

import errno
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
OPEN_FILES = 384
"""Files that are kept open, over all arrays; systems usually allow a process about a thousand."""
OTHER_FILES = 32
"""Files that a process has open for other ends: libraries, pipes, what it writes."""
_all: "weakref.WeakSet[OpenFiles]" = weakref.WeakSet()


class OpenFiles:
    """Files that were used last, kept open; it may be used by many threads."""

    def __init__(self) -> None:
        self.bytes_read = 0
        """Bytes of chunks that were read, over all arrays"""
        self._files: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._most = min(OPEN_FILES, max(1, (_allowed() - OTHER_FILES) // 2))
        _all.add(self)

    def get(self, key: Any, opened: Callable[[], T]) -> T:
        """Return the file of a key; if it has to be opened, drop the least recently used one."""
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                found: T = self._files[key]
                return found
        file = or_let_go(opened)
        with self._lock:
            self._files[key] = file
            while len(self._files) > self._most:
                self._files.popitem(last=False)
        return file

    def count(self, n_bytes: int) -> None:
        """Add to the bytes that were read."""
        with self._lock:
            self.bytes_read += n_bytes

    def let_go(self) -> None:
        """Close all files that nothing reads at this moment."""
        with self._lock:
            self._files.clear()


def or_let_go(opened: Callable[[], T]) -> T:
    """Return what a function opens; if too many files are open, after those kept are let go."""
    try:
        return opened()
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    for each in list(_all):
        each.let_go()
    return opened()


def _allowed() -> int:
    """Return how many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
