"""Stage 2: train a Lorsa on a stored layer. No language model is loaded.

    minimise  mean over tokens of ||y_hat(x) - y||^2 / d_model

with Adam, on activations scaled to a norm near sqrt(d_model).
"""

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..model import Lorsa, Quality, evaluate
from ..stop import Stop, stop_when_whole
from ..store import Activations, Batch, Sampler, batches, held_out_batches
from .checkpoint import (
    State,
    checkpoint_folder,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from .config import TrainConfig
from .errors import TrainError
from .events import Event, Look, Report, StepReport, TrainResult
from .feed import moved_ahead
from .objective import Objective
from .plan import Plan, describe, make_plan, on_main
from .run import RunFolder
from .schedule import lr_factor, top_k_at
from .setup import Scales, activation_scales, deriver, initialise

LOG_EVERY_STEPS = 10


class StepOutcome(NamedTuple):
    """What a step tells."""

    loss: Tensor
    """Of this process"""
    grad_norm: float
    lr: float
    top_k: int


def train(config: TrainConfig, *, report: Report = lambda event: None) -> TrainResult:
    """Train a Lorsa on one layer of a store and write its run folder.

    A run that was stopped goes on from its newest checkpoint; a finished one is returned as it is.

    Args:
        config: the request.
        report: is told what happens, on the main process: a line of text, a `StepReport`, a `Look`.

    Raises:
        StoreError: the store cannot be read.
        TrainError: the run cannot begin, its sizes do not fit, or its loss is not finite.
        CheckpointError: the run cannot go on from its checkpoints.
    """
    plan = make_plan(config)
    accelerator, run = plan.accelerator, RunFolder(config.out)
    if not accelerator.is_main_process:
        report = _tell_nobody
    trainer = None
    try:
        finished = on_main(accelerator, lambda: run.begin(config, plan.facts))
        if finished is not None:
            report(f"{config.out} is already finished")
            return TrainResult(**{**finished, "run": str(config.out)})
        report(describe(config, plan))
        trainer = Trainer(config, plan)
        return trainer.run(run, report)
    finally:
        run.release()
        if trainer is not None:
            trainer.release()


def check(config: TrainConfig) -> None:
    """Raise what `train` would raise before its first step; nothing is written."""
    plan = make_plan(config)
    # the main process alone looks: it may begin while others still check
    on_main(plan.accelerator, lambda: RunFolder(config.out).require_same(config, plan.facts))


def _tell_nobody(_event: Event) -> None:
    """Take the place of a report on all processes but the main one."""


class Trainer:
    """One run: its Lorsa, optimizer and data, and where it stands."""

    def __init__(self, config: TrainConfig, plan: Plan) -> None:
        """Bring everything together; `run` does the work."""
        self.config = config
        self.store = store = plan.store
        self.span = span = plan.span
        self.accelerator = accelerator = plan.accelerator
        self.device: torch.device = accelerator.device
        self.low = plan.low
        self.lorsa = Lorsa(plan.shape, backend=config.backend).to(self.device)
        self.derive = deriver(config.layer, store, self.device)
        self.scales: Scales = activation_scales(config.layer, store)
        self.sampler = Sampler(
            store.train_seqs,
            store.manifest.shard_seqs,
            batch_seqs=span.batch_seqs,
            seed=config.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        self.adam = torch.optim.Adam(
            self.lorsa.parameters(), lr=config.lr, betas=config.betas, fused=True
        )
        n_ov_heads = plan.shape.n_ov_heads
        self.last_fired = torch.zeros(n_ov_heads, dtype=torch.int64, device=self.device)
        self.done = 0
        """Steps done."""
        self.n_timed = 0
        self.busy_s = 0.0
        self.wait_s = 0.0

    def run(self, run: RunFolder, report: Report) -> TrainResult:
        """Train to the end and write the result."""
        started = time.perf_counter()
        self.start(run, report)
        if self.done == 0:
            self.look(run, report)
        # of several processes each would stop at another step
        with stop_when_whole(enabled=self.accelerator.num_processes == 1) as stop:
            self.steps(run, report, stop)
        return self.finish(run, report, time.perf_counter() - started)

    def steps(self, run: RunFolder, report: Report, stop: Stop) -> None:
        """Take the steps that are left.

        Raises:
            KeyboardInterrupt: the process was asked to stop; a checkpoint was written.
        """
        saved_at = time.monotonic()
        for batch in self.data():
            outcome = self.step(batch)
            if self.done % LOG_EVERY_STEPS == 0 or self.done == self.span.n_steps:
                self.tell(run, report, outcome)
            if self.done == self.span.n_steps:
                break
            if self.done % self.span.eval_every_steps == 0:
                self.look(run, report)
            if stop.asked or self.checkpoint_due(saved_at):
                self.save(run)
                saved_at = time.monotonic()
            if stop.asked:
                report(f"stopped after step {self.done:,}; a checkpoint is written")
                raise KeyboardInterrupt

    def start(self, run: RunFolder, report: Report) -> None:
        """Take up the newest checkpoint or initialise, then share the main process's weights."""
        state = self.newest_state(run, report)
        if state is not None:
            self.done, self.last_fired = state.step, state.last_fired
        else:
            report("initialising")
            initialise(self.lorsa, self.config, self.store, self.derive)
            self.lorsa.rescale_(*self.scales)
        if self.accelerator.is_main_process:
            run.drop_after(self.done)
        self.step_module, self.optimizer = self.accelerator.prepare(
            Objective(self.lorsa), self.adam
        )

    def newest_state(self, run: RunFolder, report: Report) -> State | None:
        """Take up the newest good checkpoint: the main process's choice, on all processes."""

        def choose() -> State | None:
            return load_newest_checkpoint(run.root, self.lorsa, self.adam, self.scales, report)

        chosen = on_main(self.accelerator, choose)
        if chosen is None or self.accelerator.is_main_process:
            return chosen
        folder = checkpoint_folder(run.root, chosen.step)
        return load_checkpoint(folder, self.lorsa, self.adam, self.scales)

    def data(self) -> Iterator[Batch]:
        """Yield what is left of the run's batches, timing how long each was waited for."""
        read = batches(
            self.store,
            self.config.layer,
            self.sampler,
            first_step=self.done,
            n_steps=self.span.n_steps,
            pin=self.device.type == "cuda",
        )
        for batch in moved_ahead(read, self.device):
            self.wait_s += batch.wait_s
            yield batch

    def step(self, batch: Batch) -> StepOutcome:
        """Take one optimizer step.

        Raises:
            TrainError: loss or gradient is not finite; the weights are as before the step.
        """
        started = time.perf_counter()
        x, y = self.scaled(batch.stored.on(self.device, self.derive))
        # where a batch cannot be shared evenly, the gradients' mean over processes is weighted
        weight = len(x) * self.accelerator.num_processes / self.span.batch_seqs
        lr, top_k = self.lr(), self.top_k()
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            out = self.step_module(x, y, top_k)
        mean = out.loss * weight
        self.accelerator.backward(mean)
        norm = self.accelerator.clip_grad_norm_(self.lorsa.parameters(), self.config.grad_clip)
        loss, grad_norm = torch.stack((mean.detach(), norm.detach())).tolist()
        if not math.isfinite(grad_norm + loss):
            raise TrainError(
                f"step {self.done + 1}: loss is {loss}, gradient norm {grad_norm}; "
                f"the weights were left as before it. Use a smaller --lr than {self.config.lr}"
            )
        self.optimizer.step()
        self.done += 1
        fired = torch.where(out.acts != 0, self.done, 0).flatten()
        self.last_fired.scatter_reduce_(0, out.ids.long().flatten(), fired, "amax")
        self.busy_s += time.perf_counter() - started + batch.wait_s
        self.n_timed += 1
        return StepOutcome(mean.detach(), grad_norm, lr, top_k)

    def tell(self, run: RunFolder, report: Report, outcome: StepOutcome) -> None:
        """Report where the run stands."""
        line = StepReport(
            step=self.done,
            tokens=self.tokens(),
            train_tokens=self.span.train_tokens,
            loss=float(self.accelerator.reduce(outcome.loss, "mean")),
            grad_norm=outcome.grad_norm,
            lr=outcome.lr,
            top_k=outcome.top_k,
            dead_fraction=self.dead_fraction(),
            tokens_per_second=self.tokens_per_second(),
            data_wait_fraction=self.wait_s / max(self.busy_s, 1e-9),
        )
        if self.accelerator.is_main_process:
            run.log(line._asdict())
        report(line)

    def look(self, run: RunFolder, report: Report) -> None:
        """Measure the quality on some held-out tokens."""
        quality = self.quality(self.config.eval_tokens)
        look = Look(self.done, self.tokens(), quality)
        if self.accelerator.is_main_process:
            run.log({"step": look.step, "tokens": look.tokens, "held_out": asdict(quality)})
        report(look)

    def save(self, run: RunFolder) -> None:
        """Write a checkpoint."""
        state = State(self.done, self.all_last_fired())

        def write() -> None:
            save_checkpoint(run.root, self.lorsa, self.adam, state, self.scales)

        on_main(self.accelerator, write)

    def finish(self, run: RunFolder, report: Report, seconds: float) -> TrainResult:
        """Measure all held-out tokens, write the Lorsa and the result."""
        quality = self.quality(None)
        shape = self.lorsa.config
        result = TrainResult(
            run=str(run.root),
            layer=self.config.layer,
            fvu=quality.fvu if math.isfinite(quality.fvu) else None,
            l0=quality.l0,
            dead_fraction=self.dead_fraction(),
            dead_window_tokens=self.span.dead_window_tokens,
            n_ov_heads=shape.n_ov_heads,
            n_qk_heads=shape.n_qk_heads,
            top_k=shape.top_k,
            train_tokens=self.span.train_tokens,
            held_out_tokens=quality.n_tokens,
            tokens_per_second=self.tokens_per_second(),
            data_wait_fraction=self.wait_s / max(self.busy_s, 1e-9),
            seconds=seconds,
        )
        self.lorsa.rescale_(1 / self.scales.x, 1 / self.scales.y)
        if self.accelerator.is_main_process:
            run.log({"step": self.done, "tokens": self.tokens(), "held_out": asdict(quality)})
            self.lorsa.save_pretrained(run.root)
            run.finish(asdict(result))
        self.accelerator.wait_for_everyone()
        report(Look(self.done, self.tokens(), quality))
        return result

    def quality(self, n_tokens: int | None) -> Quality:
        """Return the quality on so many held-out tokens; None takes all."""
        held_out = held_out_batches(
            self.store,
            self.config.layer,
            batch_seqs=-(-self.span.batch_seqs // self.accelerator.num_processes),
            n_tokens=n_tokens,
            device=self.device,
            derive=self.derive,
        )
        return evaluate(self.lorsa, map(self.scaled, held_out))

    def scaled(self, batch: Activations) -> Activations:
        """Return a batch scaled."""
        return Activations(batch.x * self.scales.x, batch.y * self.scales.y)

    def tokens(self) -> int:
        """Return the tokens seen, over all processes."""
        return self.done * self.span.step_tokens

    def lr(self) -> float:
        """Return the learning rate of the next step; the first of a warm-up is above 0."""
        seen = self.tokens() + self.span.step_tokens / 2
        return self.config.lr * lr_factor(self.config, seen, self.span.train_tokens)

    def top_k(self) -> int:
        """Return how many heads fire per token in the next step."""
        return top_k_at(
            self.config, self.tokens(), self.span.train_tokens, self.lorsa.config.n_ov_heads
        )

    def all_last_fired(self) -> Tensor:
        """Return when each head last fired on any process, [n_ov_heads]."""
        gathered: Tensor = self.accelerator.gather(self.last_fired[None])
        return gathered.amax(dim=0)

    def dead_fraction(self) -> float:
        """Return the share of heads that did not fire in the window of dead heads."""
        silent_tokens = (self.done - self.all_last_fired()) * self.span.step_tokens
        return float((silent_tokens >= self.span.dead_window_tokens).double().mean())

    def tokens_per_second(self) -> float:
        """Return the rate of the training steps, looks and checkpoints left out."""
        return self.n_timed * self.span.step_tokens / max(self.busy_s, 1e-9)

    def checkpoint_due(self, saved_at: float) -> bool:
        """Tell whether to write a checkpoint now; the main process decides by the clock."""
        every = self.config.checkpoint_every_tokens
        if every is not None and self.tokens() % every < self.span.step_tokens:
            return True
        if self.done % LOG_EVERY_STEPS:
            return False
        late = time.monotonic() - saved_at > self.config.checkpoint_every_minutes * 60
        return bool(broadcast_object_list([late])[0])

    def release(self) -> None:
        """Give back the device's memory: the wrapped module holds itself in a circle."""
        self.accelerator.free_memory()
        gc.collect()
