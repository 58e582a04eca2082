"""Evaluation of Lorsas: on stored activations, and inside the language model.

    loss recovered = (CE_ablated - CE_lorsa) / (CE_ablated - CE_original)

CE is the mean cross-entropy of the next token, in nats. Ablated means that the attention layer's
output is zero, or its mean. 1 is as good as the layer, 0 as bad as having none. Several runs are
measured one by one, and then with all their layers replaced at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..dictionaries.fetch import local_folder
from ..language.edit import Replacement
from ..language.stored import deriver
from ..language.subject import Subject
from ..progress import Measured, Report, Stages
from ..sites import attention_ports
from ..stop import stop_at_once
from ..store.read.loader import held_out_batches
from ..store.read.reader import ActivationStore
from .config import EvalConfig
from .in_model import Variant, batch_seqs, run_variants
from .kept import Asked, asked_of, keep_evaluation, read_evaluation
from .losses import CrossEntropy, cross_entropy
from .on_store import StoreQuality, measure
from .opened import Opened, device_for, load_store_model, open_run

MEAN_SEQS = 64
"""Training sequences that the mean of y is taken over."""
IN_MODEL = "in the model"
"""Part of an evaluation as it is reported."""
TOGETHER = "all runs together"
"""Name of the losses with all layers replaced at once, among those of single runs."""
VARIANTS = ("lorsa", "zero_ablated", "mean_ablated")
"""Names of what takes the place of a layer's output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """Quality of one run, from `evaluate_run`."""

    run: str
    """Folder of the Lorsa."""
    layer: int
    """Layer of the language model."""
    quality: StoreQuality
    """Measures on held-out tokens of the store."""
    cross_entropy: CrossEntropy | None
    """Losses in the language model; None if none was given."""

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, on held-out tokens."""
        return self.quality.fvu

    @property
    def l0(self) -> float:
        """Heads that fire per held-out token."""
        return self.quality.l0

    @property
    def n_tokens(self) -> int:
        """Held-out tokens that were measured on the store."""
        return self.quality.n_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as JSON-able data, the shares recovered among them.

        `dead_fraction` is the share of heads that did not fire on `dead_window_tokens` tokens,
        which are those held out. The fewer the tokens, the larger it is. Training counts over a
        longer window.
        """
        ce = self.cross_entropy
        return {
            "run": self.run,
            "layer": self.layer,
            **self.quality.to_dict(),
            "dead_window_tokens": self.n_tokens,
            "cross_entropy": None if ce is None else ce.to_dict(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelities:
    """Quality of several runs, from `evaluate_runs`."""

    runs: list[Fidelity]
    """Each run alone."""
    together: CrossEntropy | None
    """Losses with the layers of all runs replaced, or ablated, at once; None without a model, for a
    single run, and where two runs are of one layer."""

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as JSON-able data."""
        together = None
        if self.together is not None:
            layers = sorted(run.layer for run in self.runs)
            together = {"layers": layers, "cross_entropy": self.together.to_dict()}
        return {"runs": [run.to_dict() for run in self.runs], "together": together}


def evaluate_run(config: EvalConfig, *, report: Report = lambda event: None) -> Fidelity:
    """Measure a trained Lorsa on held-out data, and keep the figures in eval.json beside it.

    Args:
        config: the request.
        report: called with a line of text, or with `Measured`.

    Raises:
        CheckpointError: the run holds no Lorsa.
        StoreError: the store cannot be read.
        AnalyzeError: the Lorsa does not belong to the store, a loss is not finite, or an earlier
            evaluation beside it is damaged.
        HarvestError: the language model cannot be had, or is not the store's.
        KeyboardInterrupt: the process was asked to stop.
    """
    return evaluate_runs([config], report=report).runs[0]


def evaluate_runs(
    configs: Sequence[EvalConfig], *, report: Report = lambda event: None
) -> Fidelities:
    """Measure several Lorsas of one store, each alone and then all together; see `evaluate_run`.

    Args:
        configs: requests that differ in their run alone.
        report: called with a line of text, or with `Measured`.

    Raises:
        ValueError: the configs differ in more, or there are none.
        CheckpointError, StoreError, AnalyzeError, HarvestError, KeyboardInterrupt: see
            `evaluate_run`.
    """
    if not configs or any(replace(c, run=configs[0].run) != configs[0] for c in configs):
        raise ValueError("configs must be one or more that differ in run alone")
    config = configs[0]
    with stop_at_once():
        store = ActivationStore.open(config.store)
        device = device_for(config.device)
        subjects = [open_run(c.run, store, device) for c in configs]
        for subject in subjects:
            read_evaluation(local_folder(subject.run))  # what it has of losses is kept
        if config.model is not None:
            Subject.find(config.model)  # refuse a missing model at once
        stages = [_on_store(subject.layer) for subject in subjects]
        report(Stages((*stages, *(() if config.model is None else ("loading", IN_MODEL)))))
        qualities = [_on_the_store(subject, config, device, report) for subject in subjects]
        losses = {}
        if config.model is not None:
            losses = _in_the_model(subjects, config, device, report)
    runs = [
        Fidelity(
            run=(run := str(subject.run)),
            layer=subject.layer,
            quality=quality,
            cross_entropy=losses.get(run),
        )
        for subject, quality in zip(subjects, qualities, strict=True)
    ]
    asked = asked_of(config, store.manifest.uuid)
    for found in runs:
        _write(found, asked, report)
    return Fidelities(runs=runs, together=losses.get(TOGETHER))


def _write(found: Fidelity, asked: Asked, report: Report) -> None:
    """Write the measures of a run beside it; a run that cannot be written is no failure."""
    try:
        keep_evaluation(local_folder(Path(found.run)), found.to_dict(), asked)
    except OSError as error:
        report(f"the figures of {found.run} were not kept beside it: {error.strerror or error}")


def _on_store(layer: int) -> str:
    """Return what is reported as a layer is measured on the store."""
    return f"layer {layer} on the store"


def _on_the_store(subject: Opened, config: EvalConfig, device: str, report: Report) -> StoreQuality:
    store = subject.store
    n_ctx = store.manifest.n_ctx
    total = len(store.held_out_seqs) * n_ctx
    if config.tokens is not None:
        total = min(total, -(-config.tokens // n_ctx) * n_ctx)
    batches = held_out_batches(
        store,
        attention_ports(subject.layer),
        batch_seqs=batch_seqs(n_ctx),
        n_tokens=config.tokens,
        device=device,
        derive=deriver(store, device),
    )

    what = _on_store(subject.layer)
    return measure(subject.lorsa, batches, n_ctx, lambda n: report(Measured(n, total, what)))


def _in_the_model(
    subjects: Sequence[Opened], config: EvalConfig, device: str, report: Report
) -> dict[str, CrossEntropy]:
    """Return the losses of the language model by run, and those of all layers at once as TOGETHER.

    It runs as it is, with each layer replaced and ablated, and with all of them.
    """
    assert config.model is not None
    store, layers = subjects[0].store, sorted({subject.layer for subject in subjects})
    model, sites, _subject = load_store_model(store, config.model, layers, device, report)
    n_seqs = max(1, config.ce_tokens // store.manifest.n_ctx)
    tokens = store.tokens(store.held_out_seqs[:n_seqs])
    replaced = {
        str(subject.run): [(sites[subject.layer], _stand_ins(subject, device))]
        for subject in subjects
    }
    if 1 < len(subjects) == len(layers):
        replaced[TOGETHER] = [layer for of_run in replaced.values() for layer in of_run]
    variants: dict[tuple[str, str], Variant] = {
        (run, name): [(site, stand_ins[name]) for site, stand_ins in of_run]
        for run, of_run in replaced.items()
        for name in VARIANTS
    }
    total, what = tokens.numel(), f"{IN_MODEL}, {len(variants) + 1} times"
    original, found = run_variants(
        model, tokens, variants, lambda n: report(Measured(n, total, what))
    )
    return {
        run: cross_entropy({"original": original} | {n: found[run, n] for n in VARIANTS}, run)
        for run in replaced
    }


def _stand_ins(subject: Opened, device: str) -> dict[str, Replacement]:
    """Return replacements of a layer's output, by VARIANTS."""
    store, ports = subject.store, attention_ports(subject.layer)
    derive = deriver(store, device)
    seqs = store.train_seqs[:MEAN_SEQS]
    total = torch.zeros(store.width(*ports.writes), dtype=torch.float64, device=device)
    for seq in seqs.tolist():
        total += store.stored(ports, [seq]).on(device, derive).y.double().sum(dim=(0, 1))
    mean = (total / (len(seqs) * store.manifest.n_ctx)).float()
    return {
        "lorsa": lambda x: subject.lorsa(x.float()),
        "zero_ablated": torch.zeros_like,
        "mean_ablated": lambda x: mean.to(x.device).expand_as(x),
    }
