"""Jobs behind the model's back: in order, bounded, and never failing in silence."""

import threading
import time

import pytest
from lorsa.errors import StoreError
from lorsa.store.write.behind import WriteBehind


def test_jobs_are_done_in_order_and_hold_no_more_than_allowed() -> None:
    behind, done = WriteBehind(10), []
    for i in range(30):
        behind.make_room(4)
        behind.submit(lambda i=i: (time.sleep(0.001), done.append(i)), 4)  # type: ignore[misc]
    behind.drain()
    assert done == list(range(30))
    assert behind.peak_bytes == 8
    behind.close()


def test_a_full_buffer_makes_the_model_wait() -> None:
    behind, go, waited = WriteBehind(10), threading.Event(), []
    behind.make_room(10)
    behind.submit(lambda: (go.wait(5), waited.append("written")), 10)  # type: ignore[func-returns-value, arg-type, return-value]
    threading.Timer(0.05, go.set).start()
    behind.make_room(1)
    assert waited == ["written"]
    behind.close()


def test_what_can_never_fit_is_refused_with_what_to_type() -> None:
    behind = WriteBehind(10**9)
    with pytest.raises(StoreError, match=r"takes 2 GB, more than the buffer of 1 GB: use a larger"):
        behind.make_room(2 * 10**9)
    behind.close()


def test_a_failure_is_raised_at_the_next_step_and_later_jobs_are_not_done() -> None:
    behind, done = WriteBehind(10), []

    def fail() -> None:
        raise StoreError("the disk is full")

    behind.make_room(10)
    behind.submit(fail, 6)
    behind.submit(lambda: done.append(1), 4)
    with pytest.raises(StoreError, match="the disk is full"):
        behind.drain()
    with pytest.raises(StoreError, match="the disk is full"):
        behind.make_room(1)
    behind.forget()
    behind.make_room(10)
    assert done == []
    behind.close()
