"""Write behind the model's back: jobs in order, in a thread, that hold no more than so many bytes.

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
    """One thread that does jobs, and a bound on what they hold meanwhile."""

    def __init__(self, buffer_bytes: int) -> None:
        """Set how many bytes the jobs that wait may hold together."""
        self._buffer_bytes = buffer_bytes
        self._held = 0
        self._peak = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorsa-writer")
        self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lorsa-encoder")
        """For what a job wants done in parallel."""

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were held at a time."""
        return self._peak

    def reserve(self, n_bytes: int) -> None:
        """Wait until so many bytes more may be held, and count them as held.

        Raises:
            StoreError: they are more than may ever be held; or whatever an earlier job raised.
        """
        if n_bytes > self._buffer_bytes:
            raise StoreError(
                f"a layer's batch takes {n_bytes / 1e9:.3g} GB, more than the buffer of "
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
        """Have a job done after all earlier ones; then the bytes are no longer held.

        Returns:
            What it gives; None if it, or an earlier one, has failed.
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
        """Wait for all jobs; raises what one of them raised."""
        self._wait()
        self.raise_failure()

    def reset(self) -> BaseException | None:
        """Wait for all jobs, and forget and return what they raised: what they wrote is dropped."""
        self._wait()
        failure, self._failure = self._failure, None
        self._held = 0  # what was held for a batch that never came is not
        return failure

    def close(self) -> None:
        """End the threads."""
        self._thread.shutdown()
        self.pool.shutdown()

    def _wait(self) -> None:
        self._thread.submit(lambda: None).result()

    def raise_failure(self) -> None:
        """Raise what a job raised, if one did."""
        if self._failure is not None:
            raise self._failure
