"""Run the model over the shards that are missing, until the store is finished."""

import time
from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import Tensor

from ..language.capture import Capture
from ..language.stored import stored_readings
from ..language.watch import Watch
from ..stop import stop_when_whole
from ..store.manifest import Manifest
from ..store.write.writer import StoreWriter
from .events import HarvestReport, Progress
from .forward import BatchSize, timed
from .plan import Estimate
from .processes import this_process


class Pass(NamedTuple):
    """Language model with hooks, and how it is run over a shard."""

    capture: Capture
    """Hooks on the sites that are to be written"""
    batch: BatchSize
    """Sequences of a forward pass"""
    keep_nonfinite: bool
    """Whether activations with NaN or Inf are stored instead of raising"""
    report: HarvestReport

    def estimate(self, tokens: Tensor, n_tokens: int) -> Estimate:
        """Time a batch; report and return how long so many tokens will take.

        Args:
            tokens: sequences, [n, n_ctx]; at most a batch of them is run.
            n_tokens: tokens that are missing.
        """
        self.capture.run(tokens[:1])  # the first pass is slow
        rate = self.batch.fitting(lambda n: timed(self.capture, tokens[:n]), self.report)
        rate *= this_process().world
        seconds = n_tokens / rate
        found = Estimate(batch_seqs=self.batch.seqs, tokens_per_second=rate, seconds=seconds)
        self.report(found)
        return found


class _Meter:
    """Counts the tokens in the store, and how fast this process adds to them."""

    def __init__(self, writer: StoreWriter, report: HarvestReport) -> None:
        self._manifest = writer.manifest
        self._report = report
        self._n_tokens = self._manifest.n_seq * self._manifest.n_ctx
        self._n_stored = 0
        self._n_done = 0
        self._started = time.perf_counter()

    @property
    def rate(self) -> float:
        """Tokens per second of this process."""
        return self._n_done / max(time.perf_counter() - self._started, 1e-9)

    def stored(self, n_missing_seqs: int) -> None:
        """Take note of how many sequences are missing, and report."""
        self._n_stored = self._n_tokens - n_missing_seqs * self._manifest.n_ctx
        self._progress(self._n_stored)

    def done(self, n_seqs: int, n_of_shard: int) -> None:
        """Count a batch of n_seqs sequences, the last of n_of_shard of a shard, and report."""
        n_ctx = self._manifest.n_ctx
        self._n_done += n_seqs * n_ctx
        self._progress(min(self._n_tokens, self._n_stored + n_of_shard * n_ctx))

    def _progress(self, n_tokens: int) -> None:
        self._report(Progress(n_tokens, self._n_tokens, self.rate))


def write_shards(writer: StoreWriter, run: Pass) -> float:
    """Harvest every missing shard that no other process takes; return tokens per second.

    Raises:
        KeyboardInterrupt: the process was asked to stop; the shard at hand was finished.
    """
    if missing := writer.missing_shards():
        rows = writer.manifest.shard_rows(missing[0])
        run.estimate(writer.tokens(rows), n_tokens_of(writer.manifest, missing))
    meter = _Meter(writer, run.report)

    def report_stop() -> None:
        run.report("stopping when this shard is written; ask again to stop at once")

    n_awaited = 0

    def wait(n_shards: int) -> None:
        nonlocal n_awaited
        if stop.asked:
            raise KeyboardInterrupt
        if n_shards != n_awaited:
            run.report(f"waiting for {n_shards} shards that other processes are writing")
        n_awaited = n_shards

    known = stored_readings(writer.root, writer.manifest)
    watch = Watch(run.capture.model, run.capture.attention, known)
    with stop_when_whole(on_first=report_stop) as stop:
        meter.stored(writer.status.n_missing_seqs())
        for shard in writer.claimed_shards(waiting=wait):
            _write(writer, shard, run, meter, watch)
            # as of the last claim: reading every file after every shard would take long
            meter.stored(writer.status.n_missing_seqs(but=writer.unsettled))
            if stop.asked:
                writer.settle()
                raise KeyboardInterrupt
    writer.finish()
    return meter.rate


def _write(writer: StoreWriter, shard: int, run: Pass, meter: _Meter, watch: Watch) -> None:
    """Harvest one shard; from its start with smaller batches where the GPU's memory is full."""
    rows = writer.manifest.shard_rows(shard)

    def attempt(n_seqs: int) -> None:
        with writer.shard(shard, keep_nonfinite=run.keep_nonfinite, wait=False) as session:
            for some in _split(rows, n_seqs):
                seen = run.capture.see(writer.tokens(some))
                watch.see(seen.attention, some.start)
                session.append(seen.sites)
                writer.settle(wait=False)
                meter.done(len(some), some.stop - rows.start)
            watch.check()

    run.batch.fitting(attempt, run.report)


def _split(rows: range, size: int) -> Iterator[range]:
    for first in range(rows.start, rows.stop, size):
        yield range(first, min(first + size, rows.stop))


def n_tokens_of(manifest: Manifest, shards: Collection[int]) -> int:
    """Return how many tokens some shards hold."""
    return sum(len(manifest.shard_rows(shard)) for shard in shards) * manifest.n_ctx
