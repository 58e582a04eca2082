"""Verification of stores, runs, analyses, traces, pages and dictionaries, file by file."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .analyze.explanations import EXPLANATIONS, read_explanations
from .analyze.folder import partial_problem
from .analyze.result import Analysis
from .analyze.schema import FACTS_FILE, PARTIAL_FILE
from .circuits.tracing.files import FACTS as TRACE
from .circuits.tracing.files import read_trace
from .dictionaries.checkpoint import WEIGHTS_BY_FORMAT, config_class, is_bound, load
from .dictionaries.choices import CONFIG, WEIGHTS
from .errors import CheckpointError, LorsaError, reason_of
from .evaluate.kept import EVAL, read_evaluation
from .seal import SEAL, check_seal, is_sealed, read_summed
from .store.care.repair import verify_store
from .store.care.verify import CheckReport
from .store.folder import is_begun, is_complete
from .store.places import Place, place
from .train.checkpoint import CHECKPOINTS, checkpoints, load_checkpoint
from .train.origin import RUN
from .train.run_folder import METRICS, damaged_lines
from .train.sweep import SWEEP
from .view.files import INDEX, is_page, page_problems
from .whole import PARTIAL


class Verified(NamedTuple):
    """One thing that was verified."""

    path: str
    """Folder of the thing"""
    kind: str
    """store, run, analysis, page, sweep, trace, Lorsa, SAE, transcoder or dictionary"""
    problems: list[str]
    """A line for each file that is not what was written"""
    finished: bool = True
    """Whether it is finished; the command that began it goes on with it otherwise"""
    sealed: bool = True
    """Whether there are checksums of its files; what earlier versions wrote has none"""
    next: str | None = None
    """What to type, where that mends it"""


def verify_paths(
    paths: Sequence[str | Path], *, full: bool = False, report: CheckReport = lambda event: None
) -> dict[str, Any]:
    """Return what is wrong with everything that lies in some folders, as JSON-able data.

    Args:
        paths: stores, runs, analyses, pages, shared dictionaries, or folders that hold any of them.
        full: whether to read every byte of stores; otherwise presence, sizes and metadata of theirs
            are checked. All else is always read.
        report: called with how much has been read of a store.

    Returns:
        ok: whether nothing is wrong; found: a `Verified` each; problems: those of all; next: what
        to type, where that mends it.

    Raises:
        LorsaError: there is nothing to verify in one of them.
    """
    found: list[Verified] = []
    for path in paths:
        inside = list(_look(place(path), lambda store: _store(store, report, full=full)))
        if not inside:
            raise LorsaError(
                f"{path} holds nothing to verify; give a store, a run, an analysis, a trace, a "
                "page, a shared dictionary, or a folder with some of them"
            )
        found += inside
    problems = [problem for each in found for problem in each.problems]
    return {
        "ok": not problems,
        "full": full,
        "found": [each._asdict() for each in found],
        "problems": problems,
        "next": next((each.next for each in found if each.next is not None), None),
    }


def _look(where: Place, verify_one: Callable[[Place], Verified]) -> Iterator[Verified]:
    """Yield what a folder is, and what lies in it."""
    if is_complete(where) or is_begun(where):
        yield verify_one(where)
        return
    if not isinstance(where, Path) or not where.is_dir():
        return
    if is_page(where):
        yield _page(where)
        return
    kind = next((verify for name, verify in KINDS.items() if (where / name).is_file()), None)
    if kind is not None and (kind is not _dictionary or _has_weights(where)):
        yield kind(where)
    for inner in sorted(path for path in where.iterdir() if path.is_dir()):
        if inner.suffix != PARTIAL and inner.name != CHECKPOINTS and not inner.is_symlink():
            yield from _look(inner, verify_one)


def _store(where: Place, report: CheckReport, *, full: bool) -> Verified:
    try:
        found = verify_store(where, full=full, report=report)
    except (LorsaError, OSError) as error:
        return Verified(str(where), "store", [_line(where, error)])
    problems = [f"{where / damage['path']} {damage['problem']}" for damage in found["damages"]]
    done = bool(found["complete"])
    return Verified(
        str(where), "store", problems, finished=done, next=found["next"] if done else None
    )


def _run(where: Path) -> Verified:
    problems: list[str] = []
    try:
        content = read_summed(where / RUN)
        finished = content.get("result") is not None
    except (OSError, ValueError, AttributeError) as error:
        finished = False
        problems.append(_line(where / RUN, error))
    if finished:
        problems += _sealed_or_loaded(where)
    else:
        lines = damaged_lines(where / METRICS)
        problems += [f"{where / METRICS}: line {number} is damaged" for number in lines]
        for folder in checkpoints(where):
            problems += _tried(folder, partial(load_checkpoint, folder))
    problems += _tried(where / EVAL, lambda: read_evaluation(where))
    sealed = is_sealed(where) or not finished
    return Verified(str(where), "run", problems, finished=finished, sealed=sealed)


def _analysis(where: Path) -> Verified:
    finished = (where / FACTS_FILE).exists()
    if not finished:
        problem = partial_problem(where / PARTIAL_FILE)
        return Verified(
            str(where), "analysis", [] if problem is None else [problem], finished=False
        )
    problems = check_seal(where)
    if not is_sealed(where):
        problems = _tried(where, lambda: Analysis.open(where).read_all())
    problems += _tried(where / EXPLANATIONS, lambda: read_explanations(where / EXPLANATIONS))
    return Verified(str(where), "analysis", problems, sealed=is_sealed(where))


def _page(where: Path) -> Verified:
    try:
        problems = page_problems(where)
    except OSError as error:
        problems = [_line(where / INDEX, error)]
    return Verified(str(where), "page", problems or [], sealed=problems is not None)


def _sweep(where: Path) -> Verified:
    return Verified(str(where), "sweep", check_seal(where), sealed=is_sealed(where))


def _trace(where: Path) -> Verified:
    problems = check_seal(where) or _tried(where, lambda: read_trace(where))
    return Verified(str(where), "trace", problems)


def _dictionary(where: Path) -> Verified:
    problems = [*_sealed_or_loaded(where), *_tried(where / EVAL, lambda: read_evaluation(where))]
    bound = is_sealed(where) or ((where / WEIGHTS).is_file() and not problems and is_bound(where))
    return Verified(str(where), _noun(where), problems, sealed=bound)


def _noun(where: Path) -> str:
    """Return the kind of a folder's dictionary; "dictionary" if its config cannot be read."""
    try:
        return config_class(where).noun
    except CheckpointError:
        return "dictionary"


KINDS: dict[str, Callable[[Path], Verified]] = {
    RUN: _run,
    FACTS_FILE: _analysis,
    PARTIAL_FILE: _analysis,
    SWEEP: _sweep,
    TRACE: _trace,
    CONFIG: _dictionary,
    SEAL: _sweep,
}
"""What a folder is by a file that it has, the first that is there."""


def _has_weights(where: Path) -> bool:
    """Return whether a folder with a config.json, as other programs have, is a dictionary's."""
    return is_sealed(where) or any(
        (where / name).is_file() for names in WEIGHTS_BY_FORMAT.values() for name in names
    )


def _sealed_or_loaded(where: Path) -> list[str]:
    """Return what is wrong with a dictionary; its files bind each other where there is no seal."""
    return check_seal(where) if is_sealed(where) else _tried(where, lambda: load(where))


def _tried(what: Path, read: Callable[[], Any]) -> list[str]:
    """Return the line with which reading fails, if it does."""
    try:
        read()
    except (LorsaError, OSError) as error:
        return [_line(what, error)]
    return []


def _line(what: Place, error: Exception) -> str:
    if isinstance(error, LorsaError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or what} cannot be read ({reason_of(error)})"
    return f"{what} is damaged ({error})"
