"""Runs that share what is read: every batch is read, converted, moved and scaled once for all.

They have layer, store, order and size of a step in common and differ in anything else. Each takes
its own steps, looks, checkpoints and end; where one fails, the others go on.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from ..dictionaries.metrics import Quality, Tally
from ..errors import RUN_ERRORS, TrainError
from ..language.stored import deriver
from ..stop import Stop, stop_when_whole
from ..store.read.loader import Batch, batches, held_out_parts
from ..store.read.reader import Activations, ActivationStore, Derive
from ..store.read.sampler import Sampler
from .alarm import one_line
from .feed import moved_ahead
from .run import Clock, Member, StepOutcome
from .start import Initialiser
from .team import FAILURES

LOG_EVERY_STEPS = 10
ENDLESS = 1 << 62
HELD_OUT_PARTS = 8
"""Held-out sequences are measured in parts of this share of a step, whoever takes them: so the
figure does not depend on the number of processes."""
Work = Callable[[Member], None]


class _Read(NamedTuple):
    """What a step needs of the store, read before the step: it fails where all can be told."""

    batch: Batch | None
    """None at the end, or if it cannot be read"""
    failure: Exception | None
    """Why it cannot"""
    failures: dict[Member, Exception]
    """Why what single runs need of it cannot be read: which of its tokens count"""


class _Said(NamedTuple):
    """What the processes tell each other after a step."""

    stop: bool
    """Any of them was asked to stop"""
    unread: bool
    """Any of them could not read something of the next step"""
    late: bool
    """The main process finds that it is time for a checkpoint"""
    clock: Clock
    """The main process's"""
    losses: list[float]
    """Of every member that took the step"""


class Group:
    """Some runs and the data that they share."""

    def __init__(self, members: list[Member], store: ActivationStore) -> None:
        """Choose runs of one layer, order and step; `run` does the work."""
        self.members = members
        self.store = store
        first = members[0]
        self.team, self.layer, self.scales = first.team, first.config.layer, first.scales
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
        self.checkpoint_every_s = 60 * min(m.config.checkpoint_every_minutes for m in members)
        self.n_timed = 0
        self.busy_s = 0.0
        self.wait_s = 0.0

    def run(self) -> None:
        """Train all members to their ends; what went wrong is their `failure`.

        Raises:
            KeyboardInterrupt: the process was asked to stop; checkpoints were written.
        """
        self.started = self.saved_at = time.monotonic()
        try:
            self.derive = self.team.together(
                lambda: deriver(self.layer, self.store, self.team.device)
            )
            self.each(self.members, Member.begin)
            self.start()
            self.look([m for m in self.running() if m.done == 0])
            self.finish([m for m in self.running() if m.done >= m.span.n_steps])
            with stop_when_whole() as stop:
                self.steps(stop)
            if stop.asked and self.team.world == 1:  # while the last were measured
                raise KeyboardInterrupt
        except FAILURES as error:  # of what all share: a batch, the layer's weights
            if not self.team.is_agreed(error):
                raise  # the other processes go on
            for member in self.running():
                member.fail(error)
        finally:
            for member in self.members:
                member.close()

    def start(self) -> None:
        """Take up or initialise every run."""
        initialiser = Initialiser(self.store, self.derive)
        self.each(self.running(), lambda m: m.start(lambda: initialiser.fill(m.lorsa, m.config)))

    def steps(self, stop: Stop) -> None:
        """Take the steps that are left."""
        if not self.running():
            return
        step = min(m.done for m in self.running())
        data = self.data(step)
        ahead = self.read(data, step)
        self.agree_on(ahead)
        while ahead.batch is not None and self.running():
            now = [m for m in self.running() if m.done == step]  # others are ahead of it
            outcomes = self.step(now, ahead.batch)
            step += 1
            ahead = self.read(data, step)
            said = self.exchange(step, stop, ahead, list(outcomes.values()))
            stepped = dict(zip(outcomes, said.losses, strict=True))
            self.tell(outcomes, stepped, said.clock)
            now = [m for m in outcomes if m.running]
            self.look([m for m in now if self.look_due(m)])
            self.finish([m for m in now if m.done >= m.span.n_steps])
            self.save(now, said)
            if said.stop:
                for member in self.running():
                    member.report(f"stopped after step {member.done:,}; a checkpoint is written")
                raise self.team.agreed(KeyboardInterrupt())
            if said.unread:
                self.agree_on(ahead)

    def read(self, data: Iterator[Batch], step: int) -> _Read:
        """Read what a step needs; what goes wrong is noted."""
        try:
            batch = next(data, None)
        except FAILURES as error:
            return _Read(None, error, {})
        failures: dict[Member, Exception] = {}
        for member in self.running() if batch is not None else ():
            try:
                member.mask.look_up(self.sampler.whole_batch(step))
            except FAILURES as error:
                failures[member] = error
        return _Read(batch, None, failures)

    def agree_on(self, read: _Read) -> None:
        """Raise on all processes what one could not read; a run's own failure ends that run."""
        self.team.together(partial(_fail_by, read.failure))

        def agree(member: Member) -> None:
            self.team.together(partial(_fail_by, read.failures.get(member)))

        self.each(self.running(), agree)

    def step(self, members: list[Member], batch: Batch) -> dict[Member, StepOutcome]:
        """Let some members take a step on a batch; those that fail leave."""
        started = time.perf_counter()
        scaled = self.scaled(batch.stored.on(self.team.device, self.derive))
        whole = self.sampler.whole_batch(members[0].done) if members else ()
        outcomes: dict[Member, StepOutcome] = {}

        def take(member: Member) -> None:
            outcomes[member] = member.step(scaled, mine=batch.seqs, whole=whole)

        self.each(members, take)
        self.wait_s += batch.wait_s
        self.busy_s += time.perf_counter() - started + batch.wait_s
        self.n_timed += 1
        return outcomes

    def exchange(self, step: int, stop: Stop, read: _Read, outcomes: list[StepOutcome]) -> _Said:
        """Bring stop, what was not read, time and losses together over the processes."""
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
        return _Said(
            stop=any(total["stop"]),
            unread=any(total["unread"]),
            late=any(total["late"]),
            clock=Clock(*total["clock"]),
            losses=total["losses"],
        )

    def tell(
        self, outcomes: dict[Member, StepOutcome], losses: dict[Member, float], clock: Clock
    ) -> None:
        """Report where the runs stand, now and then."""

        def tell(member: Member) -> None:
            if member.done % LOG_EVERY_STEPS == 0 or member.done == 3:
                member.plan_for_time(clock)
            if member.done % LOG_EVERY_STEPS == 0 or member.done == member.span.n_steps:
                member.tell(outcomes[member], losses[member], clock)

        self.each(list(outcomes), tell)

    def look_due(self, member: Member) -> bool:
        """Tell whether to measure a run in its middle."""
        return member.done < member.span.n_steps and member.done % member.span.eval_every_steps == 0

    def look(self, members: list[Member]) -> None:
        """Measure some runs on some held-out tokens."""
        for n_tokens in sorted({m.config.eval_tokens for m in members}):
            alike = [m for m in members if m.config.eval_tokens == n_tokens]
            qualities = self.qualities(alike, n_tokens)
            self.each(list(qualities), partial(_look, qualities))

    def finish(self, members: list[Member]) -> None:
        """Measure some runs on all held-out tokens and write their results."""
        if members:
            clock = self.clock()
            qualities = self.qualities(members, None)
            self.each(list(qualities), lambda m: m.finish(qualities[m], clock))
            self.team.wait()

    def save(self, members: list[Member], said: _Said) -> None:
        """Write the checkpoints that are due."""
        every = said.stop or said.late
        # one that is ahead of the others has its checkpoint
        due = [m for m in members if m.running and (every or m.checkpoint_due())]
        self.each(due, lambda m: m.save(said.clock))
        if every:
            self.saved_at = time.monotonic()

    def each(self, members: list[Member], work: Work) -> None:
        """Do something for each of some runs; one that cannot go on leaves the group."""
        for member in members:
            try:
                work(member)
            except RUN_ERRORS as error:
                if not self.team.is_agreed(error):
                    raise  # the other processes go on with this run
                member.fail(error)
            except torch.OutOfMemoryError as error:
                if self.team.world > 1:
                    raise  # the others wait for this process
                if member.learner is not None:
                    member.learner.clear()
                member.fail(TrainError(one_line(error)))

    def running(self) -> list[Member]:
        """Return the runs with steps left."""
        return [m for m in self.members if m.running]

    def data(self, first_step: int) -> Iterator[Batch]:
        """Yield what is left of the runs' batches."""
        endless = any(m.config.minutes is not None for m in self.running())
        read = batches(
            self.store,
            self.layer,
            self.sampler,
            first_step=first_step,
            n_steps=ENDLESS if endless else max(m.span.n_steps for m in self.running()),
            pin=self.team.device.type == "cuda",
        )
        yield from moved_ahead(read, self.team.device)

    def qualities(self, members: list[Member], n_tokens: int | None) -> dict[Member, Quality]:
        """Return the quality of some runs on so many held-out tokens; None takes all.

        A run that cannot be measured fails, and is left out.
        """
        tallies = {m: Tally(m.lorsa) for m in members}
        failures = self.measure(tallies, n_tokens)
        found: dict[Member, Quality] = {}

        def merge(member: Member) -> None:
            tally = tallies[member]
            tally.become(self.team.each(lambda: _sums(tally, failures.get(member))))
            found[member] = tally.quality()

        self.each(members, merge)
        return found

    def measure(
        self, tallies: dict[Member, Tally], n_tokens: int | None
    ) -> dict[Member, Exception]:
        """Add this process's share of the held-out tokens up; return what went wrong, by run."""
        batch_seqs = -(-self.batch_seqs // HELD_OUT_PARTS)
        parts = list(held_out_parts(self.store, batch_seqs=batch_seqs, n_tokens=n_tokens))
        failures: dict[Member, Exception] = {}
        with ExitStack() as looking:
            for member in tallies:
                looking.enter_context(member.looking())
            for seqs in parts[self.team.rank :: self.team.world]:
                try:
                    stored = self.store.stored(self.layer, seqs)
                    x, y = self.scaled(stored.on(self.team.device, self.derive))
                except FAILURES as error:
                    return dict.fromkeys(tallies, error)
                for member in [m for m in tallies if m not in failures]:
                    try:
                        tallies[member].update(x, y, member.counted(seqs))
                    except FAILURES as error:
                        failures[member] = error
        return failures

    def scaled(self, batch: Activations) -> Activations:
        """Return a batch scaled."""
        return Activations(batch.x * self.scales.x, batch.y * self.scales.y)

    def clock(self) -> Clock:
        """Return the time as this process has it."""
        return Clock(
            spent_s=time.monotonic() - self.started,
            step_s=self.busy_s / max(self.n_timed, 1),
            wait_fraction=self.wait_s / max(self.busy_s, 1e-9),
        )

    def release(self) -> None:
        """Give back the device's memory: a wrapped module holds itself in a circle."""
        self.members.clear()
        self.team.release()
        gc.collect()


def _fail_by(error: Exception | None) -> None:
    if error is not None:
        raise error


def _sums(tally: Tally, failure: Exception | None) -> Any:
    _fail_by(failure)
    return tally.sums()


def _look(qualities: dict[Member, Quality], member: Member) -> None:
    member.look(qualities[member])
