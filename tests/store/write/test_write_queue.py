"""Queued jobs: in order, bounded, and never failing in silence."""

import threading
import time

import pytest
from lorsa.errors import StoreError
from lorsa.store.write.write_queue import WriteQueue


def test_jobs_are_done_in_order_and_hold_no_more_than_allowed() -> None:
    queue, done = WriteQueue(10), []
    for i in range(30):
        queue.reserve(4)
        queue.submit(lambda i=i: (time.sleep(0.001), done.append(i)), 4)  # type: ignore[misc]
    queue.drain()
    assert done == list(range(30))
    assert queue.peak_bytes == 8
    queue.close()


def test_a_full_buffer_makes_the_model_wait() -> None:
    queue, go, waited = WriteQueue(10), threading.Event(), []
    queue.reserve(10)
    queue.submit(lambda: (go.wait(5), waited.append("written")), 10)  # type: ignore[func-returns-value, arg-type, return-value]
    threading.Timer(0.05, go.set).start()
    queue.reserve(1)
    assert waited == ["written"]
    queue.close()


def test_what_can_never_fit_is_refused_with_what_to_type() -> None:
    queue = WriteQueue(10**9)
    with pytest.raises(StoreError, match=r"takes 2 GB, more than the buffer of 1 GB: use a larger"):
        queue.reserve(2 * 10**9)
    queue.close()


def test_a_failure_is_raised_at_the_next_step_and_later_jobs_are_not_done() -> None:
    queue, done = WriteQueue(10), []

    def fail() -> None:
        raise StoreError("the disk is full")

    queue.reserve(10)
    queue.submit(fail, 6)
    queue.submit(lambda: done.append(1), 4)
    with pytest.raises(StoreError, match="the disk is full"):
        queue.drain()
    with pytest.raises(StoreError, match="the disk is full"):
        queue.reserve(1)
    queue.reset()
    queue.reserve(10)
    assert done == []
    queue.close()
