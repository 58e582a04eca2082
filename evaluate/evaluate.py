"""Evaluation of dictionaries: on stored activations, and inside the language model.

    loss recovered = (CE_ablated - CE_replaced) / (CE_ablated - CE_original)

CE is the mean cross-entropy of the next token, in nats. Replaced means that the dictionary's output
is in place of what it approximates, ablated that zero is there, or the mean. 1 is as good as the
model, 0 as bad as nothing. Beside each figure is that of random features (random_features.py).
Several runs, of any kinds, are measured one by one, and then all at once.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.fetch import local_folder
from ..dictionaries.sae import Sae
from ..language.edit import Gap, Replacement, gaps
from ..language.stored import deriver
from ..language.subject import Subject
from ..progress import Measured, Report, Stages
from ..sites import Ports
from ..stop import stop_at_once
from ..store.read.loader import held_out_batches
from ..store.read.reader import ActivationStore
from ..store.read.stored import Activations
from .config import EvalConfig
from .in_model import batch_seqs, run_variants
from .kept import Asked, asked_of, keep_evaluation, read_evaluation
from .losses import CrossEntropy, Replacements, cross_entropy
from .on_store import OUTLIER, StoreQuality, measure
from .opened import Opened, device_for, load_store_model, open_run
from .random_features import mean_of, random_features

MEAN_SEQS = 64
"""Training sequences that the mean of y is taken over."""
FACTOR_TOKENS = 8192
"""Tokens of these that the factor of random features is fitted to."""
IN_MODEL = "in the model"
"""Part of an evaluation as it is reported."""
TOGETHER = "all runs together"
"""Name of the losses with all layers replaced at once, among those of single runs."""
OF_RANDOM = ("fvu", "fvu_usual", "nmse", "cosine", "l0")
"""Measures on the store that are shown of random features."""
VARIANTS = Replacements._fields
"""Names of what takes the place of a dictionary's output."""


class _Measured(NamedTuple):
    """A run as it was measured on the store, and what its place is filled with besides."""

    quality: StoreQuality
    random: StoreQuality
    """Measures of `features` on the same tokens"""
    mean: Tensor
    """Mean of y over training tokens, [d_model]"""
    features: Sae
    """Random features of the same number and L0"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """Quality of one run, from `evaluate_run`."""

    run: str
    """Folder of the dictionary."""
    kind: str
    """Kind of dictionary: lorsa, sae or transcoder."""
    layer: int
    """Layer of the language model."""
    ports: Ports
    """Sites that it reads and writes."""
    quality: StoreQuality
    """Measures on held-out tokens of the store."""
    random: StoreQuality
    """Measures of random features of the same number and L0 on the same tokens."""
    cross_entropy: CrossEntropy | None
    """Losses in the language model; None if none was given."""

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, on held-out tokens."""
        return self.quality.fvu

    @property
    def l0(self) -> float:
        """Features that fire per held-out token."""
        return self.quality.l0

    @property
    def n_tokens(self) -> int:
        """Held-out tokens that were measured on the store."""
        return self.quality.n_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as JSON-able data, the shares recovered among them.

        `dead_fraction` is the share of features that did not fire on `dead_window_tokens` tokens,
        which are those held out. The fewer the tokens, the larger it is. Training counts over a
        longer window.
        """
        ce = self.cross_entropy
        return {
            "run": self.run,
            "kind": self.kind,
            "layer": self.layer,
            "reads": [str(site) for site in self.ports.reads],
            "writes": [str(site) for site in self.ports.writes],
            **self.quality.to_dict(),
            "random": {name: self.random.to_dict()[name] for name in OF_RANDOM},
            "dead_window_tokens": self.n_tokens,
            "cross_entropy": None if ce is None else ce.to_dict(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelities:
    """Quality of several runs, from `evaluate_runs`."""

    runs: list[Fidelity]
    """Each run alone."""
    together: CrossEntropy | None
    """Losses with all runs in their places, or ablated, at once; None without a model, for a single
    run, and where two runs write one site."""

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as JSON-able data."""
        together = None
        if self.together is not None:
            written = [site for run in self.runs for site in run.ports.writes]
            together = {
                "layers": sorted({site.layer for site in written}),
                "writes": [str(site) for site in sorted(written, key=lambda site: site.place)],
                "cross_entropy": self.together.to_dict(),
            }
        return {"runs": [run.to_dict() for run in self.runs], "together": together}


def evaluate_run(config: EvalConfig, *, report: Report = lambda event: None) -> Fidelity:
    """Measure a trained dictionary on held-out data; keep the figures in eval.json beside it.

    Args:
        config: the request.
        report: called with a line of text, or with `Measured`.

    Raises:
        CheckpointError: the run holds no dictionary.
        StoreError: the store cannot be read, or lacks a site.
        AnalyzeError: the dictionary does not belong to the store, a loss is not finite, or an
            earlier evaluation beside it is damaged.
        HarvestError: the language model cannot be had, or is not the store's.
        KeyboardInterrupt: the process was asked to stop.
    """
    return evaluate_runs([config], report=report).runs[0]


def evaluate_runs(
    configs: Sequence[EvalConfig], *, report: Report = lambda event: None
) -> Fidelities:
    """Measure dictionaries of one store, each alone and then all together; see `evaluate_run`.

    Args:
        configs: requests that differ in their run alone.
        report: called with a line of text, or with `Measured`.

    Raises:
        ValueError: the configs differ in more, or there are none; or without `each`, a single run,
            or two that write one site.
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
        if not config.each:
            _require_together(subjects)
        for subject in subjects:
            read_evaluation(local_folder(subject.run))  # what it has of losses is kept
        if config.model is not None:
            Subject.find(config.model)  # refuse a missing model at once
        stages = [_on_store(subject) for subject in subjects]
        report(Stages((*stages, *(() if config.model is None else ("loading", IN_MODEL)))))
        measured = [_on_the_store(subject, config, device, report) for subject in subjects]
        losses = {}
        if config.model is not None:
            losses = _in_the_model(subjects, measured, config, device, report)
    runs = [
        Fidelity(
            run=(run := str(subject.run)),
            kind=subject.dictionary.kind,
            layer=subject.layer,
            ports=subject.ports,
            quality=found.quality,
            random=found.random,
            cross_entropy=losses.get(run),
        )
        for subject, found in zip(subjects, measured, strict=True)
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


def _on_store(subject: Opened) -> str:
    """Return what is reported as a run is measured on the store."""
    return f"{subject.name} on the store"


def _on_the_store(subject: Opened, config: EvalConfig, device: str, report: Report) -> _Measured:
    """Measure a run, and random features of its L0 on the same tokens."""
    store, dictionary = subject.store, subject.dictionary
    n_ctx, what = store.manifest.n_ctx, _on_store(subject)
    derive = deriver(store, device)
    n_tokens = len(store.held_out_seqs) * n_ctx
    if config.tokens is not None:
        n_tokens = min(n_tokens, -(-config.tokens // n_ctx) * n_ctx)

    def batches(ports: Ports) -> Iterable[Activations]:
        return held_out_batches(
            store,
            ports,
            batch_seqs=batch_seqs(n_ctx),
            n_tokens=config.tokens,
            device=device,
            derive=derive,
        )

    def outputs(seqs: Sequence[int], longest: float = math.inf) -> Iterator[Tensor]:
        for seq in seqs:
            y = store.stored(written, [seq]).on(device, derive).y
            yield y[~(y.float().norm(dim=2) > longest)][None]

    written = Ports(subject.ports.writes, subject.ports.writes)
    longest = OUTLIER * store.median_norm(written.writes[0])
    quality = measure(
        dictionary,
        batches(subject.ports),
        n_ctx,
        lambda n: report(Measured(n, 2 * n_tokens, what)),
        longest=longest,
    )
    seqs = store.train_seqs[:MEAN_SEQS].tolist()
    mean, usual_mean = mean_of(outputs(seqs)), mean_of(outputs(seqs, longest))
    some = seqs[: max(1, FACTOR_TOKENS // n_ctx)]
    usual = outputs(some, longest)
    random = random_features(dictionary.config, quality.l0, usual_mean, usual)
    beside = measure(
        random,
        batches(written),
        n_ctx,
        lambda n: report(Measured(n_tokens + n, 2 * n_tokens, what)),
        longest=longest,
    )
    return _Measured(quality, beside, mean, random)


def _in_the_model(
    subjects: Sequence[Opened],
    measured: Sequence[_Measured],
    config: EvalConfig,
    device: str,
    report: Report,
) -> dict[str, CrossEntropy]:
    """Return the losses of the language model by run, and those of all runs at once as TOGETHER.

    It runs as it is, with each run's output replaced and ablated, and with all of them.
    """
    assert config.model is not None
    store, written = subjects[0].store, {s for each in subjects for s in each.ports.writes}
    layers = sorted({subject.layer for subject in subjects})
    model = load_store_model(store, config.model, layers, device, report).model
    n_seqs = max(1, config.ce_tokens // store.manifest.n_ctx)
    tokens = store.tokens(store.held_out_seqs[:n_seqs])
    places = zip(subjects, measured, _gaps(model, subjects), strict=True)
    filled = {str(subject.run): [_stand_ins(subject, found, *at)] for subject, found, at in places}
    if 1 < len(subjects) == len(written):
        together = [one for of_run in filled.values() for one in of_run]
        filled = (filled if config.each else {}) | {TOGETHER: together}
    variants = {
        (run, name): [stand_ins[name] for stand_ins in of_run]
        for run, of_run in filled.items()
        for name in VARIANTS
    }
    total, what = tokens.numel(), f"{IN_MODEL}, {len(variants) + 1} times"
    original, found = run_variants(
        model, tokens, variants, lambda n: report(Measured(n, total, what))
    )
    return {
        run: cross_entropy({"original": original} | {n: found[run, n] for n in VARIANTS}, run)
        for run in filled
    }


def _require_together(subjects: Sequence[Opened]) -> None:
    """Raise ValueError for runs that cannot be in their places at once."""
    written = [site for subject in subjects for site in subject.ports.writes]
    twice = sorted({str(site) for site in written if written.count(site) > 1})
    if len(subjects) < 2:
        raise ValueError("--no-each (each=False) is for several runs: name more, or leave it out")
    if twice:
        raise ValueError(
            f"two runs write {', '.join(twice)}, so they cannot be in place at once: name one of "
            "them, or leave out --no-each (each=False)"
        )


def _gaps(model: Any, subjects: Sequence[Opened]) -> list[tuple[Gap, Gap]]:
    """Return where each dictionary stands in, and where something does that reads what it writes.

    Both lie where it writes.
    """
    ports = [subject.ports for subject in subjects]
    found = gaps(model, [*ports, *(Ports(each.writes, each.writes) for each in ports)])
    return list(zip(found[: len(ports)], found[len(ports) :], strict=True))


def _stand_ins(
    subject: Opened, found: _Measured, between: Gap, at: Gap
) -> dict[str, tuple[Gap, Replacement]]:
    """Return what takes the place of a dictionary's output, by VARIANTS."""
    return {
        "replaced": (between, lambda x: subject.dictionary(x.float())),
        "zero_ablated": (at, torch.zeros_like),
        "mean_ablated": (at, lambda y: found.mean.to(y.device).expand_as(y)),
        "random": (at, lambda y: found.features(y.float())),
    }
