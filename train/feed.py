"""Batches on their way to the device, one ahead of the step that computes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..store.read.loader import Batch


class _Moving(NamedTuple):
    batch: Batch
    arrived: Any
    """Event that ends the copy"""


def moved_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device; each is copied to a GPU while the step before it computes.

    Args:
        batches: batches on the host, in pinned memory that is filled again once the next one is
            asked for.
        device: the device that they are moved to; a CPU's stay in place.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    moving: _Moving | None = None
    while True:
        if moving is not None:
            moving.arrived.synchronize()  # its place on the host may be filled again
        batch = next(batches, None)
        following = None if batch is None else _move(batch, stream)
        if moving is not None:
            now = torch.cuda.current_stream(device)
            now.wait_event(moving.arrived)
            for tensor in moving.batch.stored.tensors():
                tensor.record_stream(now)
            yield moving.batch
        if following is None:
            return
        moving = following


def _move(batch: Batch, stream: torch.cuda.Stream) -> _Moving:
    """Begin to copy a batch in a stream of its own, in the store's dtype."""
    with torch.cuda.stream(stream):
        stored = batch.stored.to(stream.device, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(stream)
    return _Moving(batch._replace(stored=stored), arrived)
