"""Train one dictionary, or many that share what is read."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from ..errors import RUN_ERRORS, TrainError
from ..kernels.dispatch import choose_path
from ..language.device import choose_device
from ..store.places import Place
from ..store.read.reader import ActivationStore
from .alarm import one_line
from .config import TrainConfig
from .extent import SHARED_BYTES, SPARE, free_memory_bytes, require_room, run_bytes
from .group import Group
from .report.events import Ended, ReportEvent, ReportRun, RunEvent, TrainEvent, TrainResult
from .request import Request, make_request
from .run import Run
from .run_folder import RunFolder
from .team import FAILURES, Team, all_processes, portable


class RunOutcome(NamedTuple):
    """Outcome of one of several runs."""

    config: TrainConfig
    result: TrainResult | None
    """Result; None if the run failed"""
    failure: Exception | None
    group: str | None = None
    """Name of the run's group; None if the run did not begin, or was finished before"""
    bytes_read: int = 0
    """Bytes that the group read from the store, in this call"""


def train(config: TrainConfig, *, report: ReportEvent = lambda event: None) -> TrainResult:
    """Train a dictionary on one layer of a store and write its run folder.

    A run that was stopped resumes from its newest checkpoint; a finished one is returned as it is.
    With several processes, each takes its share of every step.

    Args:
        config: settings of the run.
        report: receives each event, on the main process: a line of text, a `StepReport`, an
            `EvalReport`.

    Raises:
        StoreError: the store cannot be read.
        TrainError: the run cannot begin, its sizes do not fit, or its loss is not finite.
        CheckpointError: the run cannot go on from its checkpoints.
        KeyboardInterrupt: the process was asked to stop; a checkpoint was written.
    """

    def report_event(of_run: RunEvent) -> None:
        if not isinstance(of_run.event, Ended):  # it is returned or raised
            report(of_run.event)

    (outcome,) = train_many([config], report=report_event)
    if outcome.failure is not None:
        raise outcome.failure
    assert outcome.result is not None
    return outcome.result


def train_many(
    configs: Sequence[TrainConfig],
    *,
    apart: bool = False,
    report: ReportRun = lambda event: None,
) -> list[RunOutcome]:
    """Train several dictionaries; a run that fails does not stop the others.

    Runs of one store, layer, order and step that fit the device together are fed by one read. Each
    is what `train` alone would have made of it.

    Args:
        configs: settings of the runs, each with a folder of its own.
        apart: with several processes, each takes whole runs, in place of a share of every step.
        report: receives each event of a run, on the main process of those that train it.

    Returns:
        The outcome of each, in their order, on every process.

    Raises:
        TrainError: the device is not there, or sharded runs are to be trained apart.
        KeyboardInterrupt: the process was asked to stop; checkpoints were written.
    """
    everyone = all_processes(configs[0])
    if apart and everyone.world > 1 and any(config.shard for config in configs):
        raise TrainError(
            "a run cannot be sharded here: each process takes whole runs; leave out --shard, or "
            "train one run at a time with lorsa train --shard"
        )
    team = everyone.alone() if apart else everyone
    outcomes: dict[int, RunOutcome] = {}
    with everyone.alarm.listening():
        requests = _requests(configs, everyone, team, outcomes, report)
        free = team.least(free_memory_bytes(team.device))
        groups = _groups(requests, free, at_least=everyone.world if apart else 1)
        mine = _share(groups, everyone.rank, everyone.world) if apart else groups
        everyone.alarm.apart = apart
        for group in mine:
            outcomes |= _train_group(group, report)
        everyone.alarm.apart = False
        if apart:
            outcomes |= dict(everyone.gather([(n, _portable(o)) for n, o in outcomes.items()]))
    return [outcomes[number] for number in range(len(configs))]


def require_trainable(config: TrainConfig) -> None:
    """Raise what `train` would raise before its first step; nothing is written."""
    team = all_processes(config)
    with team.alarm.listening():
        store = team.together(lambda: ActivationStore.open(config.store))
        request = team.together(lambda: make_request(config, store, team))
        # the main process alone reads the folder: it may begin while others still check
        team.on_main(lambda: RunFolder(config.out).require_same(config, request.facts))


def _requests(
    configs: Sequence[TrainConfig],
    everyone: Team,
    team: Team,
    outcomes: dict[int, RunOutcome],
    report: ReportRun,
) -> list[Request]:
    """Return the runs that can begin; the outcomes of the others are added to `outcomes`."""
    stores: dict[Place, ActivationStore] = {}
    requests: list[Request] = []

    def request(number: int, config: TrainConfig) -> Request:
        if config.store not in stores:
            stores[config.store] = ActivationStore.open(config.store)
        _require_device(config, team)
        made = make_request(config, stores[config.store], team, number=number)
        _require_own_folder(config, requests)
        free = free_memory_bytes(team.device)
        require_room(made.shape, made.span, world=team.world, free=free)
        return made

    for number, config in enumerate(configs):
        try:
            requests.append(everyone.together(partial(request, number, config)))
        except RUN_ERRORS as error:
            outcomes[number] = _failed(config, error, team, report)
    return requests


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


def _require_own_folder(config: TrainConfig, others: list[Request]) -> None:
    if any(config.out.absolute() == other.config.out.absolute() for other in others):
        raise TrainError(f"another run has the folder {config.out} too")


def _groups(requests: list[Request], free: int, *, at_least: int) -> list[list[Request]]:
    """Group runs that share their batches and fit the device together.

    Args:
        requests: the runs.
        free: free bytes of the device's memory.
        at_least: groups that are wanted, if there are as many runs.
    """
    alike: dict[tuple[object, ...], list[Request]] = defaultdict(list)
    for each in requests:
        seed = each.config.order_seed
        own = each.number if each.config.shard else None  # sharded runs go one by one
        layers = tuple(sorted({site.layer for site in each.config.ports.sites}))
        key = (each.config.store, layers, seed, each.span.batch_seqs, own)
        alike[key].append(each)
    groups = []
    for some in alike.values():
        groups += _that_fit(some, free * SPARE - SHARED_BYTES)
    while len(groups) < at_least and (several := [g for g in groups if len(g) > 1]):
        largest = max(several, key=_cost)
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]
    return groups


def _that_fit(requests: list[Request], room: float) -> list[list[Request]]:
    groups: list[list[Request]] = [[]]
    left = room
    for each in requests:
        needed = run_bytes(each.shape, each.span, each.team.world)
        if needed > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append(each)
        left -= needed
    return groups


def _cost(group: list[Request]) -> int:
    """Return the cost of a group, in arbitrary units."""
    return sum(each.shape.n_features * each.span.train_tokens for each in group)


def _share(groups: list[list[Request]], rank: int, world: int) -> list[list[Request]]:
    """Return this process's groups: each goes, the dearest first, to the process with the least."""
    load = [0] * world
    mine = []
    for group in sorted(groups, key=_cost, reverse=True):
        owner = load.index(min(load))
        load[owner] += _cost(group)
        if owner == rank:
            mine.append(group)
    return mine


def _train_group(requests: list[Request], report: ReportRun) -> dict[int, RunOutcome]:
    """Train a group to its end."""
    outcomes: dict[int, RunOutcome] = {}
    runs: dict[int, Run] = {}
    for each in requests:
        report_event = partial(_report_event, report, str(each.config.out))
        try:
            runs[each.number] = each.team.together(partial(Run, each, report_event))
        except FAILURES as error:
            outcomes[each.number] = _failed(each.config, error, each.team, report)
    if not runs:
        return outcomes
    first = next(each for each in requests if each.number in runs)
    store, name = first.store, str(first.config.out)
    group = Group(list(runs.values()), store)
    before = store.bytes_read
    try:
        group.train()
        n_bytes = store.bytes_read - before
        for number, run in runs.items():
            began = None if run.finished_before else name
            outcomes[number] = RunOutcome(run.config, run.result, run.failure, began, n_bytes)
        return outcomes
    finally:
        group.release()


def _report_event(report: ReportRun, run: str, event: TrainEvent) -> None:
    report(RunEvent(run, event))


def _portable(outcome: RunOutcome) -> RunOutcome:
    """Return an outcome in a form that another process can read."""
    failure = outcome.failure
    return outcome._replace(failure=None if failure is None else portable(failure))


def _failed(config: TrainConfig, error: Exception, team: Team, report: ReportRun) -> RunOutcome:
    """Report that a run cannot begin, and return its outcome."""
    if team.is_main:
        report(RunEvent(str(config.out), Ended(None, one_line(error))))
    return RunOutcome(config, None, error)
