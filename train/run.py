"""One run of a group: its dictionary, its optimizer, its folder, and its progress."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dictionaries.dictionary import Dictionary
from ..dictionaries.kinds import KINDS
from ..dictionaries.linear import LinearDictionary
from ..errors import TrainError
from ..sites import Site
from ..store.read.rows import Seqs
from ..store.read.stored import Activations, stacked
from .checkpoint import (
    Restored,
    State,
    checkpoint_folder,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from .config import TrainConfig
from .learner import Learner
from .objective import Outcome
from .report.events import Ended, ReportEvent, TrainEvent, TrainResult, read_result
from .report.trackers import Tracker, open_tracker
from .request import Request, describe
from .run_folder import METRICS, RunFolder
from .schedule import lr_at, steps_in_time, top_k_at
from .start import Scales, scales_of

THRESHOLD_HALF_LIFE_SEQS = 64
"""Half-life, in sequences, of the running mean that is the threshold of batchtopk: enough to even
sequences out, no more, or it lags behind the weights; docs/recipe.md."""

Scaled = tuple[Site, float]
"""Site, and the factor of its activations"""


class Clock(NamedTuple):
    """Times of a group, as its main process has them."""

    spent_s: float
    """Seconds since the group began"""
    step_s: float
    """Mean seconds of a step, without evals and checkpoints"""
    wait_fraction: float
    """Share of the steps' time spent waiting for the store"""


class StepOutcome(NamedTuple):
    """Outcome of a step of one run."""

    loss: Tensor
    """This process's share of the step's loss, float64"""
    grad_norm: float
    """Norm of the gradient over all processes, before clipping"""
    lr: float
    top_k: int


class Run:
    """One run: all that it does not share with its group."""

    def __init__(self, request: Request, report: ReportEvent) -> None:
        """Bring the parts of a run together; `begin` and `start` make it ready."""
        self.config, self.span, self.facts = request.config, request.span, request.facts
        self.corpus = request.store.manifest.corpus
        self.team, self.low = request.team, request.low
        self.shape, self.mask = request.shape, request.mask
        self.about = describe(request)
        self.folder = RunFolder(self.config.out)
        self.report: ReportEvent = report if self.team.is_main else _ignore
        self.device = self.team.device
        self.ports = self.config.ports
        self.scales: Scales = scales_of(self.config, request.store)
        kind = KINDS[self.shape.kind]
        self.dictionary = kind(self.shape, backend=self.config.backend).to(self.device)
        self.learner: Learner | None = None
        self.last_fired = torch.zeros(self.shape.n_features, dtype=torch.int64, device=self.device)
        """Steps done when each feature last fired"""
        self.done = 0
        """Steps done"""
        self.spent_s = 0.0
        """Seconds that the run took before this call"""
        self.planned = False
        """Whether the number of steps is set by the minutes"""
        self.finished_before = False
        self.tracker: Tracker | None = None
        self.result: TrainResult | None = None
        self.failure: Exception | None = None

    def begin(self) -> None:
        """Open the run folder, and read the result if the run is already finished."""
        finished = self.team.on_main(
            lambda: self.folder.begin(self.config, self.facts, self.corpus)
        )
        if finished is not None:
            self.report(f"{self.config.out} is already finished")
            try:
                self.result = read_result(finished | {"run": str(self.config.out)})
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

    def start(self, fill: Callable[[Dictionary, TrainConfig], None]) -> None:
        """Resume from the newest checkpoint or initialise; share the main process's weights."""
        restored = self._newest_checkpoint()
        if restored is not None:
            self._resume(restored)
        else:
            self.report("initialising")
            self.team.together(lambda: fill(self.dictionary, self.config))
        self.dictionary.rescale_(*self.scales)
        if restored is None and isinstance(self.dictionary, LinearDictionary):
            self.dictionary.balance_()
        damaged = self.team.on_main(lambda: self.folder.drop_after(self.done))
        if damaged:
            lines = ", ".join(map(str, damaged))
            self.report(f"{self.folder.root / METRICS}: left out damaged lines, {lines}")
        self.team.on_main(self._open_tracker)
        moments = None if restored is None else restored.moments
        self.learner = Learner(self.dictionary, self.config, self.team, moments)

    def _resume(self, restored: Restored) -> None:
        state = restored.state
        self.dictionary.load_state_dict(restored.dictionary.state_dict())
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

    def close(self) -> None:
        """Let others write the folder, and close the tracker."""
        self.folder.release()
        if self.tracker is not None:
            self.tracker.close()

    def _newest_checkpoint(self) -> Restored | None:
        """Return the newest good checkpoint, chosen by the main process, on all processes."""
        root = self.folder.root
        read: list[Restored | None] = []

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

    @property
    def scaled_sites(self) -> tuple[Scaled, Scaled]:
        """Sites that are read and written, each with its factor."""
        (read,), (written,) = self.ports
        return (read, self.scales.x), (written, self.scales.y)

    def batch_of(self, values: Mapping[Scaled, Tensor]) -> Activations:
        """Return x and y, scaled, of the values that runs of the group share."""
        return stacked(self.ports, {scaled[0]: values[scaled] for scaled in self.scaled_sites})

    def step(self, values: Mapping[Scaled, Tensor], *, mine: Seqs, whole: Seqs) -> StepOutcome:
        """Take one optimizer step.

        Args:
            values: this process's share of the step, [n, n_ctx, width] of each site and factor.
            mine: its sequences.
            whole: sequences of the whole step.

        Raises:
            TrainError: loss or gradient is not finite.
        """
        learner, tokens = self.started_learner(), self.tokens()
        lr = lr_at(self.config, self.span, tokens)
        top_k = top_k_at(self.config, tokens, self.span.train_tokens, self.shape.n_features)
        learner.begin(lr)
        batch = self.batch_of(values)
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
        """Move the threshold of batchtopk towards a step's edge, the same on all processes."""
        edges = [out.edge for out in outcomes if out.edge is not None]
        if edges:
            share = 1 - 0.5 ** (self.span.batch_seqs / THRESHOLD_HALF_LIFE_SEQS)
            self.dictionary.move_threshold(self.team.sum(torch.stack(edges).double().sum()), share)

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

    def save(self, clock: Clock) -> None:
        """Write a checkpoint."""
        n_steps = None if self.config.minutes is None else self.span.n_steps
        fired = self.team.maximum(self.last_fired)
        state = State(self.done, fired, n_steps, self.spent_s + clock.spent_s)
        whole = self.started_learner().whole()

        def write() -> None:
            keep = self.config.keep_checkpoints
            root, shape = self.folder.root, self.shape
            save_checkpoint(root, shape, whole, state, self.scales, keep=keep)

        self.team.on_main(write)

    def started_learner(self) -> Learner:
        """Return the learner of a run that has started."""
        assert self.learner is not None, "start() comes first"
        return self.learner

    def fail(self, error: Exception) -> None:
        """End this run by an error; the other runs of the group go on."""
        self.failure = error
        self.report(Ended(None, str(error)))

    def plan_for_time(self, clock: Clock) -> None:
        """Set the number of steps by the minutes that are left, until the learning rate falls."""
        if self.config.minutes is None or clock.step_s == 0:
            return
        if self.planned and self.done >= self.span.n_steps * (1 - self.config.decay_frac):
            return
        self.planned = True
        left_s = self.config.minutes * 60 - self.spent_s - clock.spent_s
        n_steps = steps_in_time(
            self.config, self.span, done=self.done, left_s=left_s, step_s=clock.step_s
        )
        self.span = self.span.lasting(n_steps, self.config)

    def tokens(self) -> int:
        """Return the number of tokens seen, over all processes."""
        return self.done * self.span.step_tokens

    def dead_fraction(self) -> float:
        """Return the share of features that did not fire in the window of dead ones."""
        silent_tokens = (self.done - self.team.maximum(self.last_fired)) * self.span.step_tokens
        return float((silent_tokens >= self.span.dead_window_tokens).double().mean())

    def eval_due(self) -> bool:
        """Return whether to measure the run now, before its end."""
        return self.done < self.span.n_steps and self.done % self.span.eval_every_steps == 0

    def checkpoint_due(self) -> bool:
        """Return whether checkpoint_every_tokens asks for one now."""
        every = self.config.checkpoint_every_tokens
        return every is not None and self.tokens() % every < self.span.step_tokens


def _ignore(_event: TrainEvent) -> None:
    """Stand in for the report on all processes but the main one."""
