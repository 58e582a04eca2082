"""A queue of writes that a thread does in order while the model computes, bounded in bytes.

The thread only moves bytes; see `loader` for why.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ...errors import StoreError

T = TypeVar("T")


class WriteQueue:
    """One thread that does jobs in order, with a bound on the bytes that they hold."""

    def __init__(self, buffer_bytes: int) -> None:
        """Set the most bytes that waiting jobs may hold together."""
        self._buffer_bytes = buffer_bytes
        self._held = 0
        self._peak = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorsa-writer")
        self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lorsa-encoder")
        """Threads for work that a job does in parallel"""

    @property
    def peak_bytes(self) -> int:
        """Most bytes that were held at a time."""
        return self._peak

    def reserve(self, n_bytes: int) -> None:
        """Wait until there is room for so many bytes, and reserve them.

        Raises:
            StoreError: they exceed the bound by themselves.
            BaseException: the error of an earlier job.
        """
        if n_bytes > self._buffer_bytes:
            raise StoreError(
                f"a batch of a site takes {n_bytes / 1e9:.3g} GB, more than the buffer of "
                f"{self._buffer_bytes / 1e9:.3g} GB: use a larger --buffer-gb or smaller "
                "--batch-size"
            )
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or self._held + n_bytes <= self._buffer_bytes
            )
            self.raise_failure()
            self._held += n_bytes
            self._peak = max(self._peak, self._held)

    def submit(self, job: Callable[[], T], n_bytes: int) -> "Future[T | None]":
        """Queue a job behind all earlier ones; when it is done, its bytes are released.

        Returns:
            The job's result; None if it or an earlier one has failed.
        """

        def work() -> T | None:
            try:
                return None if self._failure is not None else job()
            except BaseException as error:  # raised where the next batch comes from
                self._failure = error
                return None
            finally:
                with self._changed:
                    self._held -= n_bytes
                    self._changed.notify_all()

        return self._thread.submit(work)

    def drain(self) -> None:
        """Wait for all jobs; raises the error of one that failed."""
        self._wait()
        self.raise_failure()

    def reset(self) -> BaseException | None:
        """Wait for all jobs, then clear and return their error; the caller drops their files."""
        self._wait()
        failure, self._failure = self._failure, None
        self._held = 0  # bytes reserved for a batch that was never submitted are free
        return failure

    def close(self) -> None:
        """End the threads."""
        self._thread.shutdown()
        self.pool.shutdown()

    def _wait(self) -> None:
        self._thread.submit(lambda: None).result()

    def raise_failure(self) -> None:
        """Raise the error of a job that failed, if one did."""
        if self._failure is not None:
            raise self._failure
