"""One run of a group: its Lorsa, its optimizer, its folder, and where it stands."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dictionaries.lorsa.module import Lorsa
from ..dictionaries.metrics import Quality
from ..errors import TrainError
from ..store.read.reader import Activations
from ..store.read.rows import Seqs
from .checkpoint import (
    Loaded,
    State,
    checkpoint_folder,
    load_checkpoint,
    load_newest_checkpoint,
    raw_lorsa,
    save_checkpoint,
)
from .config import TrainConfig
from .learner import Learner, Whole
from .objective import Outcome
from .plan import Plan, describe
from .report.curves import draw_curves
from .report.events import Ended, Event, Look, StepReport, TrainResult
from .report.trackers import Tracker, open_tracker
from .run_folder import RunFolder
from .schedule import lr_factor, top_k_at
from .start import Scales, activation_scales

THRESHOLD_HALF_LIFE_SEQS = 64
"""Of the running mean over sequences that is the threshold of batchtopk: enough to even them out,
no more, or it lags behind the weights; docs/recipe.md."""


class Clock(NamedTuple):
    """The time of a group, as its main process has it."""

    spent_s: float
    """Since the group began"""
    step_s: float
    """Of a step, looks and checkpoints left out, on average"""
    wait_fraction: float
    """Share of that spent waiting for the store"""


class StepOutcome(NamedTuple):
    """What a step of one run tells."""

    loss: Tensor
    """This process's share of the step's loss, float64"""
    grad_norm: float
    """Over all processes, before clipping"""
    lr: float
    top_k: int


class Member:
    """One run: what belongs to it alone."""

    def __init__(self, config: TrainConfig, plan: Plan, report: Callable[[Event], None]) -> None:
        """Bring a run together; `begin` and `start` take it up."""
        self.config, self.span, self.facts = config, plan.span, plan.facts
        self.corpus = plan.store.manifest.corpus
        self.team, self.low = plan.team, plan.low
        self.about = describe(config, plan)
        self.folder = RunFolder(config.out)
        self.report: Callable[[Event], None] = report if plan.team.is_main else _tell_nobody
        self.device = plan.team.device
        self.scales: Scales = activation_scales(config.layer, plan.store)
        self.shape = plan.shape
        self.mask = plan.mask
        self.lorsa = Lorsa(plan.shape, backend=config.backend).to(self.device)
        self.learner: Learner | None = None
        heads = plan.shape.n_ov_heads
        self.last_fired = torch.zeros(heads, dtype=torch.int64, device=self.device)
        self.done = 0
        """Steps done"""
        self.spent_s = 0.0
        """Time that the run took before this call"""
        self.planned = False
        """Whether the steps are those that the minutes hold"""
        self.finished_before = False
        self.tracker: Tracker | None = None
        self.result: TrainResult | None = None
        self.failure: Exception | None = None

    def begin(self) -> None:
        """Take the folder, and its result if the run is already finished."""
        finished = self.team.on_main(
            lambda: self.folder.begin(self.config, self.facts, self.corpus)
        )
        if finished is not None:
            self.report(f"{self.config.out} is already finished")
            known = {field.name for field in fields(TrainResult)}
            facts = {name: value for name, value in finished.items() if name in known}
            try:
                self.result = TrainResult(**{**facts, "run": str(self.config.out)})
            except TypeError as error:  # all processes have the same
                raise self.team.agreed(
                    TrainError(
                        f"the result in {self.folder.root} is not whole ({error}); delete it, or "
                        "choose another folder by --out"
                    )
                ) from None
            self.finished_before = True
            self.report(Ended(self.result, before=True))
        else:
            self.report(self.about)

    @property
    def running(self) -> bool:
        """Whether steps are left."""
        return self.result is None and self.failure is None

    def start(self, initialise: Callable[[], None]) -> None:
        """Take up the newest checkpoint or initialise, then share the main process's weights."""
        loaded = self._newest_checkpoint()
        if loaded is not None:
            self._take_up(loaded)
        else:
            self.report("initialising")
            self.team.together(initialise)
        self.lorsa.rescale_(*self.scales)
        self.team.on_main(lambda: self.folder.drop_after(self.done))
        self.team.on_main(self._open_tracker)
        moments = None if loaded is None else loaded.moments
        self.learner = Learner(self.lorsa, self.config, self.team, moments)

    def _take_up(self, loaded: Loaded) -> None:
        state = loaded.state
        self.lorsa.load_state_dict(loaded.lorsa.state_dict())
        self.done, self.last_fired = state.step, state.last_fired.to(self.device)
        self.spent_s = state.spent_s
        if state.n_steps is not None:
            self.planned = True
            self.span = self.span.lasting(state.n_steps, self.config)

    def _open_tracker(self) -> None:
        self.tracker = open_tracker(
            self.config.tracker,
            run=self.folder.root,
            config=self.config.to_dict(),
            first_step=self.done,
            report=self.report,
        )

    def _log(self, line: dict[str, Any]) -> None:
        """Note a line of metrics; on the main process."""
        self.folder.log(line)
        if self.tracker is not None:
            self.tracker.log(line, self.done)

    def close(self) -> None:
        """Let others write the folder, and end what listens."""
        self.folder.release()
        if self.tracker is not None:
            self.tracker.close()

    def _newest_checkpoint(self) -> Loaded | None:
        """Return the newest good checkpoint: the main process's choice, on all processes."""
        root = self.folder.root
        read: list[Loaded | None] = []

        def choose() -> int | None:
            read.append(load_newest_checkpoint(root, self.report))
            return None if read[0] is None else read[0].state.step

        step = self.team.on_main(choose)
        if step is None or self.team.world == 1:
            return read[0] if read else None
        folder = checkpoint_folder(root, step)
        return self.team.together(lambda: read[0] if read else load_checkpoint(folder))

    def counted(self, seqs: Seqs) -> Tensor | None:
        """Return which tokens of some sequences count, [n, n_ctx]; None if all do."""
        return self.mask(seqs).to(self.device) if self.mask.rule.masks else None

    def step(self, batch: Activations, *, mine: Seqs, whole: Seqs) -> StepOutcome:
        """Take one optimizer step.

        Args:
            batch: this process's share of the step, scaled.
            mine, whole: which sequences these are, and those of the whole step.

        Raises:
            TrainError: loss or gradient is not finite.
        """
        learner, lr, top_k = self._learner(), self.lr(), self.top_k()
        learner.begin(lr)
        loss, outcomes = self._gradients(learner, batch, mine, whole, top_k)
        norm = learner.clip(self.config.grad_clip)
        if not math.isfinite(norm):
            error = TrainError(
                f"step {self.done + 1} (sequences {', '.join(map(str, whole))}): loss is "
                f"{float(loss)}, gradient norm {norm}; the weights were left as before it. "
                f"Use a smaller --lr than {self.config.lr}, and another --out"
            )
            raise self.team.agreed(error)  # the norm is that of all processes
        learner.step()
        self.done += 1
        self._move_threshold(outcomes)
        for out in outcomes:
            when = torch.where(out.acts != 0, self.done, 0).flatten()
            self.last_fired.scatter_reduce_(0, out.ids.long().flatten(), when, "amax")
        return StepOutcome(loss, norm, lr, top_k)

    def _move_threshold(self, outcomes: list[Outcome]) -> None:
        """Let the threshold of batchtopk follow a step's edge, the same on all processes."""
        edges = [out.edge for out in outcomes if out.edge is not None]
        if edges:
            share = 1 - 0.5 ** (self.span.batch_seqs / THRESHOLD_HALF_LIFE_SEQS)
            self.lorsa.move_threshold(self.team.sum(torch.stack(edges).double().sum()), share)

    def _gradients(
        self, learner: Learner, batch: Activations, mine: Seqs, whole: Seqs, top_k: int
    ) -> tuple[Tensor, list[Outcome]]:
        """Add up the gradients of a share of a step, part by part; return its share of the loss."""
        masked = self.mask.rule.masks
        n_parts = len(mine) if self.config.exact else self.span.n_micro
        of_step = max(1, self.mask.n_counted(whole) if masked else len(whole))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        outcomes = []
        parts = zip(*(t.tensor_split(n_parts) for t in batch), strict=True)
        for i, ((x, y), seqs) in enumerate(zip(parts, np.array_split(mine, n_parts), strict=True)):
            counted = self.counted(seqs)
            here = len(seqs) if counted is None else int(counted.sum())
            with learner.unsynced(enabled=i + 1 < n_parts):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
                    out: Outcome = learner.module(x, y, top_k, counted, here / of_step)
                learner.backward(out.loss)
            total += out.error
            outcomes.append(out)
        return total, outcomes

    def tell(self, outcome: StepOutcome, loss: float, clock: Clock) -> None:
        """Report where the run stands.

        Args:
            outcome: of the last step.
            loss: its loss over all processes.
            clock: the group's.
        """
        line = StepReport(
            step=self.done,
            tokens=self.tokens(),
            train_tokens=self.span.train_tokens,
            loss=loss,
            grad_norm=outcome.grad_norm,
            lr=outcome.lr,
            top_k=outcome.top_k,
            dead_fraction=self.dead_fraction(),
            tokens_per_second=self.span.step_tokens / clock.step_s,
            data_wait_fraction=clock.wait_fraction,
        )
        self.team.on_main(lambda: self._log(line._asdict()))
        self.report(line)

    def looking(self) -> AbstractContextManager[None]:
        """Have the whole Lorsa on this process, to be measured."""
        return self._learner().looking()

    def look(self, quality: Quality) -> None:
        """Note the quality on held-out tokens."""
        line = {"step": self.done, "tokens": self.tokens(), "held_out": asdict(quality)}
        self.team.on_main(lambda: self._log(line))
        self.report(Look(self.done, self.tokens(), quality))

    def save(self, clock: Clock) -> None:
        """Write a checkpoint."""
        n_steps = None if self.config.minutes is None else self.span.n_steps
        fired = self.team.maximum(self.last_fired)
        state = State(self.done, fired, n_steps, self.spent_s + clock.spent_s)
        whole = self._learner().whole()

        def write() -> None:
            keep = self.config.keep_checkpoints
            root, shape = self.folder.root, self.shape
            save_checkpoint(root, shape, whole, state, self.scales, keep=keep)

        self.team.on_main(write)

    def finish(self, quality: Quality, clock: Clock) -> None:
        """Write the Lorsa and the result."""
        result = TrainResult(
            run=str(self.folder.root),
            layer=self.config.layer,
            fvu=quality.fvu if math.isfinite(quality.fvu) else None,
            l0=quality.l0,
            dead_fraction=self.dead_fraction(),
            dead_window_tokens=self.span.dead_window_tokens,
            n_ov_heads=self.shape.n_ov_heads,
            n_qk_heads=self.shape.n_qk_heads,
            top_k=self.shape.top_k,
            train_tokens=self.span.train_tokens,
            fvu_all=quality.fvu_all if math.isfinite(quality.fvu_all) else None,
            masked_fraction=quality.masked_fraction,
            held_out_tokens=quality.n_tokens,
            tokens_per_second=self.span.step_tokens / clock.step_s if clock.step_s else 0.0,
            data_wait_fraction=clock.wait_fraction,
            seconds=clock.spent_s,
        )
        whole = self._learner().whole()
        self.team.on_main(lambda: self._write(quality, whole, result))
        self.result = result
        if self.team.is_main:
            self._draw()
        self.report(Look(self.done, self.tokens(), quality))
        self.report(Ended(result))

    def _write(self, quality: Quality, whole: Whole, result: TrainResult) -> None:
        line = {"step": self.done, "tokens": self.tokens(), "held_out": asdict(quality)}
        self._log(line)
        raw_lorsa(self.shape, whole, self.scales).save_pretrained(self.folder.root)
        self.folder.finish(asdict(result))

    def _draw(self) -> None:
        """Draw the curves; a run that is finished does not fail for want of a picture."""
        try:
            draw_curves(self.folder.root)
        except Exception as error:
            self.report(f"no picture of the curves: {error}")

    def _learner(self) -> Learner:
        assert self.learner is not None, "start() comes first"
        return self.learner

    def fail(self, error: Exception) -> None:
        """Leave the group; the other runs go on."""
        self.failure = error
        self.report(Ended(None, str(error)))

    def plan_for_time(self, clock: Clock) -> None:
        """Lay the run out for its minutes, until the learning rate falls."""
        if self.config.minutes is None or clock.step_s == 0:
            return
        if self.planned and self.done >= self.span.n_steps * (1 - self.config.decay_frac):
            return
        self.planned = True
        left_s = self.config.minutes * 60 - self.spent_s - clock.spent_s
        n_steps = self.done + max(1, int(left_s / clock.step_s))
        if self.config.train_tokens is not None:
            n_steps = min(n_steps, max(1, self.config.train_tokens // self.span.step_tokens))
        self.span = self.span.lasting(n_steps, self.config)

    def tokens(self) -> int:
        """Return the tokens seen, over all processes."""
        return self.done * self.span.step_tokens

    def lr(self) -> float:
        """Return the learning rate of the next step; the first of a warm-up is above 0."""
        seen = self.tokens() + self.span.step_tokens / 2
        return self.config.lr * lr_factor(self.config, seen, self.span.train_tokens)

    def top_k(self) -> int:
        """Return how many heads fire per token in the next step."""
        return top_k_at(self.config, self.tokens(), self.span.train_tokens, self.shape.n_ov_heads)

    def dead_fraction(self) -> float:
        """Return the share of heads that did not fire in the window of dead heads."""
        silent_tokens = (self.done - self.team.maximum(self.last_fired)) * self.span.step_tokens
        return float((silent_tokens >= self.span.dead_window_tokens).double().mean())

    def checkpoint_due(self) -> bool:
        """Tell whether tokens ask for a checkpoint now."""
        every = self.config.checkpoint_every_tokens
        return every is not None and self.tokens() % every < self.span.step_tokens


def _tell_nobody(_event: Event) -> None:
    """Take the place of a report on all processes but the main one."""
