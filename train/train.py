"""Train one Lorsa, or many that share what is read."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ..errors import RUN_ERRORS, TrainError
from ..kernels.dispatch import choose_path
from ..language.device import choose_device
from ..store.places import Place
from ..store.read.reader import ActivationStore
from .alarm import one_line
from .config import TrainConfig
from .group import Group
from .memory import SHARED_BYTES, SPARE, free_bytes, require_room, run_bytes
from .plan import Plan, make_plan
from .report.events import Ended, Event, Report, RunEvent, TrainResult
from .run import Member
from .run_folder import RunFolder
from .team import FAILURES, Launch, Team, portable

ReportRun = Callable[[RunEvent], None]


class RunOutcome(NamedTuple):
    """What became of one of several runs."""

    config: TrainConfig
    result: TrainResult | None
    """None if it failed"""
    failure: Exception | None
    group: str | None = None
    """Name of the group that it was trained in; None if it did not begin, or was finished"""
    bytes_read: int = 0
    """Bytes that this group read from the store, in this call"""


class _Asked(NamedTuple):
    """A run that can begin."""

    number: int
    """Among those asked for"""
    config: TrainConfig
    plan: Plan


def train(config: TrainConfig, *, report: Report = lambda event: None) -> TrainResult:
    """Train a Lorsa on one layer of a store and write its run folder.

    A run that was stopped goes on from its newest checkpoint; a finished one is returned as it is.
    With several processes, each takes its share of every step.

    Args:
        config: the request.
        report: is told what happens, on the main process: a line of text, a `StepReport`, a `Look`.

    Raises:
        StoreError: the store cannot be read.
        TrainError: the run cannot begin, its sizes do not fit, or its loss is not finite.
        CheckpointError: the run cannot go on from its checkpoints.
        KeyboardInterrupt: the process was asked to stop; a checkpoint was written.
    """

    def tell(told: RunEvent) -> None:
        if not isinstance(told.event, Ended):  # it is returned or raised
            report(told.event)

    (outcome,) = train_many([config], report=tell)
    if outcome.failure is not None:
        raise outcome.failure
    assert outcome.result is not None
    return outcome.result


def train_many(
    configs: Sequence[TrainConfig],
    *,
    apart: bool = False,
    report: ReportRun = lambda told: None,
) -> list[RunOutcome]:
    """Train several Lorsas; a run that fails does not stop the others.

    Runs of one store, layer, order and step that fit the device together are fed by one read. Each
    is what `train` alone would have made of it.

    Args:
        configs: the requests, each with a folder of its own.
        apart: with several processes, each takes whole runs, in place of a share of every step.
        report: is told what happens to which run, on the process that speaks for it.

    Returns:
        What became of each, in their order, on every process.

    Raises:
        TrainError: the device is not there, or sharded runs are to be trained apart.
        KeyboardInterrupt: the process was asked to stop; checkpoints were written.
    """
    launch = Launch(configs[0])
    if apart and launch.world > 1 and any(config.shard for config in configs):
        raise TrainError(
            "a run cannot be sharded here: each process takes whole runs; leave out --shard, or "
            "train one run at a time with lorsa train --shard"
        )
    team = launch.team(alone=apart)
    outcomes: dict[int, RunOutcome] = {}
    with launch.alarm.listening():
        asked = _look_into(configs, launch, team, outcomes, report)
        free = team.least(free_bytes(team.device))
        groups = _groups(asked, free, at_least=launch.world if apart else 1)
        mine = _share(groups, launch.rank, launch.world) if apart else groups
        launch.alarm.apart = apart
        for group in mine:
            outcomes |= _run_group(group, report)
        launch.alarm.apart = False
        if apart:
            outcomes |= dict(launch.gather([(n, _portable(o)) for n, o in outcomes.items()]))
    return [outcomes[number] for number in range(len(configs))]


def check(config: TrainConfig) -> None:
    """Raise what `train` would raise before its first step; nothing is written."""
    launch = Launch(config)
    team = launch.team()
    with launch.alarm.listening():
        plan = team.together(lambda: make_plan(config, ActivationStore.open(config.store), team))
        # the main process alone looks: it may begin while others still check
        team.on_main(lambda: RunFolder(config.out).require_same(config, plan.facts))


def _look_into(
    configs: Sequence[TrainConfig],
    launch: Launch,
    team: Team,
    outcomes: dict[int, RunOutcome],
    report: ReportRun,
) -> list[_Asked]:
    """Return the runs that can begin; the others' outcomes are noted."""
    stores: dict[Place, ActivationStore] = {}
    asked: list[_Asked] = []
    for number, config in enumerate(configs):

        def look(number: int = number, config: TrainConfig = config) -> _Asked:
            if config.store not in stores:
                stores[config.store] = ActivationStore.open(config.store)
            _require_device(config, team)
            plan = make_plan(config, stores[config.store], team)
            _require_own_folder(config, asked)
            require_room(plan.shape, plan.span, world=team.world, free=free_bytes(team.device))
            return _Asked(number, config, plan)

        try:
            asked.append(launch.together(look))
        except RUN_ERRORS as error:
            outcomes[number] = _failed(config, error, team, report)
    return asked


def _require_device(config: TrainConfig, team: Team) -> None:
    """Raise TrainError unless a run can be computed where this process computes."""
    try:
        device = choose_device(config.device)
        choose_path(config.backend, device)
    except ValueError as error:
        raise TrainError(str(error)) from None
    if device != team.device.type:
        raise TrainError(
            f"device is {device}, but this command computes on {team.device.type}; give it one "
            "device"
        )


def _require_own_folder(config: TrainConfig, others: list[_Asked]) -> None:
    if any(config.out.absolute() == other.config.out.absolute() for other in others):
        raise TrainError(f"another run has the folder {config.out} too")


def _groups(asked: list[_Asked], free: int, *, at_least: int) -> list[list[_Asked]]:
    """Put together what shares its batches and fits the device.

    Args:
        asked: the runs.
        free: bytes of the device's memory.
        at_least: groups that are wanted, if there are as many runs.
    """
    alike: dict[tuple[object, ...], list[_Asked]] = defaultdict(list)
    for run in asked:
        seed = run.config.order_seed
        own = run.number if run.config.shard else None  # sharded runs go one by one
        key = (run.config.store, run.config.layer, seed, run.plan.span.batch_seqs, own)
        alike[key].append(run)
    groups = []
    for runs in alike.values():
        groups += _that_fit(runs, free * SPARE - SHARED_BYTES)
    while len(groups) < at_least and (several := [g for g in groups if len(g) > 1]):
        largest = max(several, key=_cost)
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]
    return groups


def _that_fit(runs: list[_Asked], room: float) -> list[list[_Asked]]:
    groups: list[list[_Asked]] = [[]]
    left = room
    for run in runs:
        needed = run_bytes(run.plan.shape, run.plan.span, run.plan.team.world)
        if needed > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append(run)
        left -= needed
    return groups


def _cost(group: list[_Asked]) -> int:
    """Return what a group costs, in arbitrary units."""
    return sum(run.plan.shape.n_ov_heads * run.plan.span.train_tokens for run in group)


def _share(groups: list[list[_Asked]], rank: int, world: int) -> list[list[_Asked]]:
    """Return this process's groups: the dearest first, each to the process with the least."""
    load = [0] * world
    mine = []
    for group in sorted(groups, key=_cost, reverse=True):
        owner = load.index(min(load))
        load[owner] += _cost(group)
        if owner == rank:
            mine.append(group)
    return mine


def _run_group(runs: list[_Asked], report: ReportRun) -> dict[int, RunOutcome]:
    """Train a group to its end."""

    def reporter(name: str) -> Callable[[Event], None]:
        return lambda event: report(RunEvent(name, event))

    outcomes: dict[int, RunOutcome] = {}
    members: dict[int, Member] = {}
    for number, config, plan in runs:
        tell = reporter(str(config.out))
        try:
            members[number] = plan.team.together(partial(Member, config, plan, tell))
        except FAILURES as error:
            outcomes[number] = _failed(config, error, plan.team, report)
    if not members:
        return outcomes
    first = next(run for run in runs if run.number in members)
    store, name = first.plan.store, str(first.config.out)
    group = Group(list(members.values()), store)
    before = store.bytes_read
    try:
        group.run()
        n_bytes = store.bytes_read - before
        for number, member in members.items():
            began = None if member.finished_before else name
            outcomes[number] = RunOutcome(
                member.config, member.result, member.failure, began, n_bytes
            )
        return outcomes
    finally:
        group.release()


def _portable(outcome: RunOutcome) -> RunOutcome:
    """Return an outcome as another process can read it."""
    failure = outcome.failure
    return outcome._replace(failure=None if failure is None else portable(failure))


def _failed(config: TrainConfig, error: Exception, team: Team, report: ReportRun) -> RunOutcome:
    """Report that a run cannot begin, and return its outcome."""
    if team.is_main:
        report(RunEvent(str(config.out), Ended(None, one_line(error))))
    return RunOutcome(config, None, error)
