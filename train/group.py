"""Group of runs that share one read of the store.

Every site that any of them reads or writes is read, converted, moved and scaled once for all. They
have layer, store, order and size of a step in common and differ in anything else, in kind and sites
too. Each takes its own steps, evals, checkpoints and end; where one fails, the others go on.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.metrics import Quality, Tally
from ..errors import RUN_ERRORS, TrainError
from ..language.stored import deriver
from ..sites import joined
from ..stop import Stop, stop_when_whole
from ..store.read.loader import Batch, batches, held_out_parts
from ..store.read.reader import ActivationStore
from ..store.read.sampler import Sampler
from ..store.read.stored import Derive, Stored
from .alarm import one_line
from .feed import moved_ahead
from .report.reporting import finish, report_eval, report_step
from .run import Clock, Run, Scaled, StepOutcome
from .start import Initialiser
from .team import FAILURES

LOG_EVERY_STEPS = 10
ENDLESS = 1 << 62
HELD_OUT_PARTS = 8
"""Parts of a step's sequences in which held-out ones are measured, whoever takes them: so the
figure does not depend on the number of processes."""


class _Read(NamedTuple):
    """Data of a step, read before the step: it fails where it can be reported to all processes."""

    batch: Batch | None
    """Batch; None at the end, or if it cannot be read"""
    failure: Exception | None
    """Why the batch cannot be read"""
    failures: dict[Run, Exception]
    """Why single runs cannot read which tokens of the batch count"""


class _Exchanged(NamedTuple):
    """Facts that all processes share after a step."""

    stop: bool
    """Whether any process was asked to stop"""
    unread: bool
    """Whether any process could not read something of the next step"""
    late: bool
    """Whether it is time for a checkpoint, by the main process"""
    clock: Clock
    """Clock of the main process"""
    losses: list[float]
    """Losses of the runs that took the step, in their order"""


class Group:
    """Runs and the data that they share."""

    def __init__(self, runs: list[Run], store: ActivationStore) -> None:
        """Choose runs of one layer, order and step; `train` does the work."""
        self.runs = runs
        self.store = store
        first = runs[0]
        self.team = first.team
        self.ports = joined(run.ports for run in runs)
        self.scaled_sites = sorted({scaled for run in runs for scaled in run.scaled_sites})
        self.batch_seqs = first.span.batch_seqs
        self.derive: Derive | None = None
        self.sampler = Sampler(
            store.train_seqs,
            store.manifest.shard_seqs,
            batch_seqs=self.batch_seqs,
            seed=first.config.order_seed,
            rank=self.team.rank,
            world=self.team.world,
        )
        self.checkpoint_every_s = 60 * min(run.config.checkpoint_every_minutes for run in runs)
        self.n_timed = 0
        self.busy_s = 0.0
        self.wait_s = 0.0

    def train(self) -> None:
        """Train all runs to their ends; what went wrong is their `failure`.

        Raises:
            KeyboardInterrupt: the process was asked to stop; checkpoints were written.
        """
        self.started = self.saved_at = time.monotonic()
        try:
            self.derive = self.team.together(lambda: deriver(self.store, self.team.device))
            self.each(self.runs, Run.begin)
            self.start()
            self.evaluate([run for run in self.running() if run.done == 0])
            self.finish([run for run in self.running() if run.done >= run.span.n_steps])
            with stop_when_whole() as stop:
                self.steps(stop)
            if stop.asked and self.team.world == 1:  # while the last were measured
                raise KeyboardInterrupt
        except FAILURES as error:  # of what all share: a batch, the layer's weights
            if not self.team.is_agreed(error):
                raise  # the other processes go on
            for run in self.running():
                run.fail(error)
        finally:
            with self.team.alarm.writing:  # a tracker may have much to send yet
                for run in self.runs:
                    run.close()

    def start(self) -> None:
        """Resume or initialise every run."""
        initialiser = Initialiser(self.store, self.derive)
        self.each(self.running(), lambda run: run.start(initialiser.fill))

    def steps(self, stop: Stop) -> None:
        """Take the steps that are left."""
        if not self.running():
            return
        step = min(run.done for run in self.running())
        data = self.data(step)
        ahead = self.read(data, step)
        self.agree_on(ahead)
        while ahead.batch is not None and self.running():
            now = [run for run in self.running() if run.done == step]  # others are ahead of it
            outcomes = self.step(now, ahead.batch)
            step += 1
            ahead = self.read(data, step)
            exchanged = self.exchange(step, stop, ahead, list(outcomes.values()))
            stepped = dict(zip(outcomes, exchanged.losses, strict=True))
            self.report(outcomes, stepped, exchanged.clock)
            now = [run for run in outcomes if run.running]
            self.evaluate([run for run in now if run.eval_due()])
            self.finish([run for run in now if run.done >= run.span.n_steps])
            self.save(now, exchanged)
            if exchanged.stop:
                for run in self.running():
                    run.report(f"stopped after step {run.done:,}; a checkpoint is written")
                raise self.team.agreed(KeyboardInterrupt())
            if exchanged.unread:
                self.agree_on(ahead)

    def read(self, data: Iterator[Batch], step: int) -> _Read:
        """Read what a step needs; what goes wrong is returned with it."""
        try:
            batch = next(data, None)
        except FAILURES as error:
            return _Read(None, error, {})
        failures: dict[Run, Exception] = {}
        for run in self.running() if batch is not None else ():
            try:
                run.mask.read(self.sampler.whole_batch(step))
            except FAILURES as error:
                failures[run] = error
        return _Read(batch, None, failures)

    def agree_on(self, read: _Read) -> None:
        """Raise a failure to read on all processes; one of a single run ends that run."""
        self.team.together(partial(_fail_by, read.failure))

        def agree(run: Run) -> None:
            self.team.together(partial(_fail_by, read.failures.get(run)))

        self.each(self.running(), agree)

    def step(self, runs: list[Run], batch: Batch) -> dict[Run, StepOutcome]:
        """Take a step of some runs on a batch; those that fail leave the group."""
        started = time.perf_counter()
        scaled = self.scaled(batch.stored)
        whole = self.sampler.whole_batch(runs[0].done) if runs else ()
        outcomes: dict[Run, StepOutcome] = {}

        def take(run: Run) -> None:
            outcomes[run] = run.step(scaled, mine=batch.seqs, whole=whole)

        self.each(runs, take)
        self.wait_s += batch.wait_s
        self.busy_s += time.perf_counter() - started + batch.wait_s
        self.n_timed += 1
        return outcomes

    def exchange(
        self, step: int, stop: Stop, read: _Read, outcomes: list[StepOutcome]
    ) -> _Exchanged:
        """Exchange stops, failures to read, time and losses over the processes."""
        is_late = time.monotonic() - self.saved_at > self.checkpoint_every_s
        speaks = self.team.is_main
        total = self.team.sums(
            {
                "stop": [stop.asked],
                "unread": [read.failure is not None or bool(read.failures)],
                "late": [speaks and is_late and step % LOG_EVERY_STEPS == 0],
                "clock": self.clock() if speaks else [0.0] * len(Clock._fields),
            },
            {"losses": [outcome.loss for outcome in outcomes]},
        )
        return _Exchanged(
            stop=any(total["stop"]),
            unread=any(total["unread"]),
            late=any(total["late"]),
            clock=Clock(*total["clock"]),
            losses=total["losses"],
        )

    def report(
        self, outcomes: dict[Run, StepOutcome], losses: dict[Run, float], clock: Clock
    ) -> None:
        """Report the progress of the runs, every so many steps."""

        def report(run: Run) -> None:
            if run.done % LOG_EVERY_STEPS == 0 or run.done == 3:
                run.plan_for_time(clock)
            if run.done % LOG_EVERY_STEPS == 0 or run.done == run.span.n_steps:
                report_step(run, outcomes[run], losses[run], clock)

        self.each(list(outcomes), report)

    def evaluate(self, runs: list[Run]) -> None:
        """Measure some runs on some held-out tokens."""
        for n_tokens in sorted({run.config.eval_tokens for run in runs}):
            alike = [run for run in runs if run.config.eval_tokens == n_tokens]
            self.measure(alike, n_tokens, report_eval)

    def finish(self, runs: list[Run]) -> None:
        """Measure some runs on all held-out tokens and write their results."""
        if runs:
            clock = self.clock()
            self.measure(runs, None, lambda run, quality: finish(run, quality, clock))
            self.team.wait()

    def save(self, runs: list[Run], exchanged: _Exchanged) -> None:
        """Write the checkpoints that are due."""
        every = exchanged.stop or exchanged.late
        # one that is ahead of the others has its checkpoint
        due = [run for run in runs if run.running and (every or run.checkpoint_due())]
        self.each(due, lambda run: run.save(exchanged.clock))
        if every:
            self.saved_at = time.monotonic()

    def each(self, runs: list[Run], work: Callable[[Run], None]) -> None:
        """Do some work for each of some runs; one that cannot go on leaves the group."""
        for run in runs:
            try:
                work(run)
            except RUN_ERRORS as error:
                if not self.team.is_agreed(error):
                    raise  # the other processes go on with this run
                run.fail(error)
            except torch.OutOfMemoryError as error:
                if self.team.world > 1:
                    raise  # the others wait for this process
                if run.learner is not None:
                    run.learner.clear()
                run.fail(TrainError(one_line(error)))

    def running(self) -> list[Run]:
        """Return the runs with steps left."""
        return [run for run in self.runs if run.running]

    def data(self, first_step: int) -> Iterator[Batch]:
        """Yield the batches from a step on."""
        endless = any(run.config.minutes is not None for run in self.running())
        read = batches(
            self.store,
            self.ports,
            self.sampler,
            first_step=first_step,
            n_steps=ENDLESS if endless else max(run.span.n_steps for run in self.running()),
            pin=self.team.device.type == "cuda",
        )
        yield from moved_ahead(read, self.team.device)

    def measure(
        self, runs: list[Run], n_tokens: int | None, use: Callable[[Run, Quality], None]
    ) -> None:
        """Measure some runs; one that cannot be measured fails.

        Args:
            runs: the runs.
            n_tokens: held-out tokens; None takes all.
            use: receives each run and its quality.
        """
        tallies = {run: Tally(run.dictionary) for run in runs}
        failures = self.tally(tallies, n_tokens)

        def merge(run: Run) -> None:
            tally = tallies[run]
            tally.become(self.team.each(lambda: _sums(tally, failures.get(run))))
            use(run, tally.quality())

        self.each(runs, merge)

    def tally(self, tallies: dict[Run, Tally], n_tokens: int | None) -> dict[Run, Exception]:
        """Add up this process's share of the held-out tokens; return what went wrong, by run."""
        batch_seqs = -(-self.batch_seqs // HELD_OUT_PARTS)
        parts = list(held_out_parts(self.store, batch_seqs=batch_seqs, n_tokens=n_tokens))
        failures: dict[Run, Exception] = {}
        with ExitStack() as unsharded:
            for run in tallies:
                unsharded.enter_context(run.started_learner().unsharded())
            for seqs in parts[self.team.rank :: self.team.world]:
                try:
                    values = self.scaled(self.store.stored(self.ports, seqs))
                except FAILURES as error:
                    return dict.fromkeys(tallies, error)
                for run in [run for run in tallies if run not in failures]:
                    try:
                        tallies[run].update(*run.batch_of(values), run.counted(seqs))
                    except FAILURES as error:
                        failures[run] = error
        return failures

    def scaled(self, stored: Stored) -> dict[Scaled, Tensor]:
        """Return activations on the device, [n, n_ctx, width] of each site and factor."""
        values = stored.values(self.team.device, self.derive)
        return {(site, scale): values[site] * scale for site, scale in self.scaled_sites}

    def clock(self) -> Clock:
        """Return the times as this process has them."""
        return Clock(
            spent_s=time.monotonic() - self.started,
            step_s=self.busy_s / max(self.n_timed, 1),
            wait_fraction=self.wait_s / max(self.busy_s, 1e-9),
        )

    def release(self) -> None:
        """Free the device's memory: a wrapped module holds itself in a circle."""
        self.runs.clear()
        self.team.release()
        gc.collect()


def _fail_by(error: Exception | None) -> None:
    if error is not None:
        raise error


def _sums(tally: Tally, failure: Exception | None) -> Any:
    _fail_by(failure)
    return tally.sums()
