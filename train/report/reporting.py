"""Reports of a run to its caller, metrics.jsonl and a tracker: steps, evals and the result."""

import math
from dataclasses import asdict
from typing import Any

from ...dictionaries.metrics import Quality
from ..checkpoint import raw_dictionary
from ..run import Clock, Run, StepOutcome
from .curves import draw_curves
from .events import Ended, EvalReport, StepReport, TrainResult


def report_step(run: Run, outcome: StepOutcome, loss: float, clock: Clock) -> None:
    """Report the progress of a run.

    Args:
        run: the run.
        outcome: outcome of its last step.
        loss: loss of that step over all processes.
        clock: the group's.
    """
    line = StepReport(
        step=run.done,
        tokens=run.tokens(),
        train_tokens=run.span.train_tokens,
        loss=loss,
        grad_norm=outcome.grad_norm,
        lr=outcome.lr,
        top_k=outcome.top_k,
        dead_fraction=run.dead_fraction(),
        tokens_per_second=run.span.step_tokens / clock.step_s,
        data_wait_fraction=clock.wait_fraction,
    )
    run.team.on_main(lambda: _log(run, line._asdict()))
    run.report(line)


def report_eval(run: Run, quality: Quality) -> None:
    """Report the quality on held-out tokens."""
    run.team.on_main(lambda: _log_eval(run, quality))
    run.report(EvalReport(run.done, run.tokens(), quality))


def finish(run: Run, quality: Quality, clock: Clock) -> None:
    """Write the dictionary and the result of a run, and report them.

    Args:
        run: the run, all of its steps done.
        quality: quality on all held-out tokens.
        clock: the group's.
    """
    sizes = run.shape.to_dict()
    result = TrainResult(
        run=str(run.folder.root),
        kind=run.config.kind,
        layer=run.config.layer,
        site=run.config.site,
        fvu=quality.fvu if math.isfinite(quality.fvu) else None,
        l0=quality.l0,
        dead_fraction=run.dead_fraction(),
        dead_window_tokens=run.span.dead_window_tokens,
        n_features=run.shape.n_features,
        n_ov_heads=sizes.get("n_ov_heads"),
        n_qk_heads=sizes.get("n_qk_heads"),
        top_k=run.shape.top_k,
        train_tokens=run.span.train_tokens,
        fvu_all=quality.fvu_all if math.isfinite(quality.fvu_all) else None,
        masked_fraction=quality.masked_fraction,
        held_out_tokens=quality.n_tokens,
        tokens_per_second=run.span.step_tokens / clock.step_s if clock.step_s else 0.0,
        data_wait_fraction=clock.wait_fraction,
        seconds=clock.spent_s,
    )
    learned = run.started_learner().whole()

    def write() -> None:
        _log_eval(run, quality)
        raw_dictionary(run.shape, learned, run.scales).save_pretrained(run.folder.root)
        _draw(run, asdict(result))
        run.folder.finish(asdict(result))

    run.team.on_main(write)
    run.result = result
    run.report(EvalReport(run.done, run.tokens(), quality))
    run.report(Ended(result))


def _log_eval(run: Run, quality: Quality) -> None:
    _log(run, {"step": run.done, "tokens": run.tokens(), "held_out": asdict(quality)})


def _log(run: Run, line: dict[str, Any]) -> None:
    """Write a line of metrics, on the main process."""
    run.folder.log(line)
    if run.tracker is not None:
        run.tracker.log(line, run.done)


def _draw(run: Run, result: dict[str, Any]) -> None:
    """Draw the curves; a finished run does not fail for want of a picture."""
    try:
        draw_curves(run.folder.root, result)
    except Exception as error:
        run.report(f"no picture of the curves: {error}")
