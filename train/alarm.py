"""Alarm by which a process that fails ends the others, past the collectives where they wait.

A collective (a sum over processes) ends when all have come to it. Gloo breaks it when a process is
gone; NCCL does not, and neither does where a process only left it out. So every process has a
thread that asks the key store of torch, which all processes can reach, whether another has failed.
The process that fails writes down why, waits until the others have read it, and ends; they end
with what it wrote: by the error of the broken collective, or, where that does not come, by force.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar

import torch

from ..errors import LorsaError, TrainError
from ..printable import printable

READ_EVERY_S = 0.5
"""Seconds between two reads of the key store."""
HEARING_S = 5.0
"""Seconds that a process which fails waits until the others have read why."""
GRACE_S = 10.0
"""Seconds that a process has to leave a collective, once another has failed, before it is ended."""
FAILED, HEARD, LEFT, BEAT = "failed", "heard", "left", "beat"
GOES_ON = "the same command goes on from the newest checkpoint"

_Error = TypeVar("_Error", bound=BaseException)
_numbers = count()


class Alarm:
    """Reports to the other processes that this one fails, and listens for their reports."""

    def __init__(self, rank: int, world: int, start: str = "") -> None:
        """Name this process; `listening` turns the alarm on.

        Args:
            rank, world: this process among all.
            start: name of this start of all processes, the same on each: a launcher that starts
                them again keeps the keys of those before.
        """
        self.rank, self.world, self.start = rank, world, start
        self.apart = False
        """Whether the processes train runs of their own now, so that one may fail alone"""
        self.writing = threading.Lock()
        """Held while files are written: a process is not ended by force meanwhile"""
        self._agreed: BaseException | None = None
        self._cause: str | None = None
        self._heard, self._over = threading.Event(), threading.Event()

    def agreed(self, error: _Error) -> _Error:
        """Note that all processes raise an error at the same place, and return it."""
        self._agreed = error
        return error

    def is_agreed(self, error: BaseException) -> bool:
        """Return whether all processes raise an error at the same place."""
        return self.world == 1 or error is self._agreed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """End the others where this process fails within, and this one where another does.

        Raises:
            TrainError: another process failed or was lost.
        """
        if self.world == 1:
            yield
            return
        store = self._store()
        self._over.clear()
        listener = threading.Thread(target=self._listen, args=(store,), daemon=True)
        listener.start()
        try:
            yield
        except BaseException as error:
            if self.is_agreed(error):
                self._leave(store, listener)
                raise
            if is_broken_collective(error):
                raise TrainError(self._why_broken(store)) from None
            self._report(store, f"process {self.rank} of {self.world} {_cause(error)}")
            raise
        else:
            self._leave(store, listener)
        finally:
            self._over.set()
            listener.join(GRACE_S)

    def _store(self) -> Any:
        """Return a connection of its own to torch's key store, with keys of this call alone."""
        distributed: Any = torch.distributed
        store = distributed.distributed_c10d._get_default_store().clone()
        return distributed.PrefixStore(f"lorsa-alarm-{self.start}-{next(_numbers)}", store)

    def _listen(self, store: Any) -> None:
        try:
            while not store.check([FAILED]):
                store.add(f"{BEAT}-{self.rank}", 1)
                if self._over.wait(READ_EVERY_S):
                    return
            self._cause = store.get(FAILED).decode()
            store.add(HEARD, 1)
        except RuntimeError:  # the process that keeps the keys is gone
            self._cause = self._cause or f"process 0 of {self.world} was lost; {GOES_ON}"
        self._heard.set()
        waited_s = 0.0
        while waited_s < GRACE_S:
            if self._over.wait(READ_EVERY_S):
                return
            waited_s = 0.0 if self.apart else waited_s + READ_EVERY_S
        with self.writing:
            try:
                print(printable(f"error: {self._cause}"), file=sys.stderr, flush=True)
            finally:  # whatever became of stderr
                os._exit(1)

    def _leave(self, store: Any, listener: threading.Thread) -> None:
        """Stop listening with the others: process 0, which may keep the keys, is the last."""
        self._over.set()
        listener.join(GRACE_S)
        with suppress(RuntimeError):  # process 0 is gone
            store.add(LEFT, 1)
            if self.rank == 0:
                self._wait_for(store, LEFT, self.world)

    def _wait_for(self, store: Any, key: str, count: int) -> None:
        """Wait a while until so many processes have counted themselves."""
        limit = time.monotonic() + HEARING_S
        while store.add(key, 0) < count and time.monotonic() < limit:
            time.sleep(READ_EVERY_S / 5)

    def _report(self, store: Any, cause: str) -> None:
        """Write why this process ends, and wait until the others have read it."""
        with suppress(RuntimeError):  # nobody is left
            if not store.check([FAILED]):
                store.set(FAILED, f"{cause}; {GOES_ON}")
            self._wait_for(store, HEARD, self.world)

    def _why_broken(self, store: Any) -> str:
        """Return why a collective broke: what another process reports, or which is silent."""
        if self._heard.wait(2 * READ_EVERY_S):
            return str(self._cause)
        try:
            before = self._beats(store)
            time.sleep(4 * READ_EVERY_S)
            silent = [r for r, beat in enumerate(self._beats(store)) if beat == before[r]]
        except RuntimeError:
            silent = [0]  # it keeps the keys
        if self._cause is not None:
            return self._cause
        which = f"process {', '.join(map(str, silent))}" if silent else "another process"
        cause = f"{which} of {self.world} was lost: killed, or its machine is not reached"
        self._report(store, cause)
        return f"{cause}; {GOES_ON}"

    def _beats(self, store: Any) -> list[int]:
        return [store.add(f"{BEAT}-{rank}", 0) for rank in range(self.world)]


def is_broken_collective(error: BaseException) -> bool:
    """Return whether an error comes from a collective that another process has left."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, with its kind if it is no known failure."""
    text = " ".join(str(error).split())
    if isinstance(error, LorsaError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return "the memory is full; give --micro-batch-tokens"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input or output'}: {error.strerror}"
    return f"{type(error).__name__}: {text}"


def _cause(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "was stopped"
    return f"failed: {one_line(error)}"
