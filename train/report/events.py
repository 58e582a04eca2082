"""Events that a training run reports while it runs, and the result that it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ...dictionaries.metrics import Quality


class StepReport(NamedTuple):
    """Progress of a run after a step."""

    step: int
    """Steps done"""
    tokens: int
    """Tokens seen"""
    train_tokens: int
    """Tokens of the whole run"""
    loss: float
    """mean (y_hat - y)^2 of the last step, over all processes, scaled activations"""
    grad_norm: float
    """Norm of the last step's gradient, before clipping"""
    lr: float
    """Learning rate of the last step"""
    top_k: int
    """Features that fired per token in the last step"""
    dead_fraction: float
    """Share of features that did not fire in the window of dead ones"""
    tokens_per_second: float
    """Tokens per second of the training steps so far"""
    data_wait_fraction: float
    """Share of the steps' time spent waiting for the store"""


class EvalReport(NamedTuple):
    """Quality on held-out tokens after some step."""

    step: int
    """Steps done"""
    tokens: int
    """Tokens seen"""
    held_out: Quality


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Result of a run."""

    run: str
    """Run folder."""
    kind: str = "lorsa"
    """Kind of dictionary: lorsa, sae or transcoder."""
    layer: int
    """Layer of the language model."""
    site: str | None = None
    """Site of an SAE; None of other kinds."""
    fvu: float | None
    """Fraction of variance unexplained on the held-out tokens that count; None where y does not
    vary."""
    fvu_all: float | None = None
    """Fraction of variance unexplained on all held-out tokens, with those that do not count."""
    masked_fraction: float = 0.0
    """Share of the held-out tokens that do not count."""
    l0: float
    """Features that fire per held-out token."""
    dead_fraction: float
    """Share of features that did not fire on the last `dead_window_tokens` training tokens."""
    dead_window_tokens: int
    """Tokens of the window of `dead_fraction`."""
    n_features: int
    """Features; of a Lorsa its OV heads."""
    n_ov_heads: int | None = None
    """OV heads of a Lorsa; None of other kinds."""
    n_qk_heads: int | None = None
    """QK heads of a Lorsa; None of other kinds."""
    top_k: int
    """Features that fire per token at most."""
    train_tokens: int
    """Tokens trained on."""
    held_out_tokens: int
    """Tokens that fvu and l0 were measured on."""
    tokens_per_second: float
    """Tokens per second of the training steps."""
    data_wait_fraction: float
    """Share of the steps' time spent waiting for the store."""
    seconds: float
    """Seconds of this call, before the final eval."""


def read_result(data: Mapping[str, Any]) -> TrainResult:
    """Return the result that a run folder holds, of this version or an earlier one.

    Raises:
        TypeError: it is not whole.
    """
    known = {field.name for field in fields(TrainResult)}
    facts = {name: value for name, value in data.items() if name in known}
    if "n_ov_heads" in facts:  # all that versions of Lorsas alone knew
        facts.setdefault("n_features", facts["n_ov_heads"])
    return TrainResult(**facts)


class Ended(NamedTuple):
    """The end of a run, finished or failed."""

    result: TrainResult | None
    """Result; None if the run failed"""
    error: str | None = None
    """Why the run failed"""
    before: bool = False
    """Whether the run was finished before this call"""


TrainEvent = str | StepReport | EvalReport | Ended
ReportEvent = Callable[[TrainEvent], None]


class RunEvent(NamedTuple):
    """An event of one run of a group."""

    run: str
    """Run folder"""
    event: TrainEvent


ReportRun = Callable[[RunEvent], None]
