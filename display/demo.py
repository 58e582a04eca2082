"""Progress and results of the demo."""

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from ..printable import printable
from ..progress import Measured
from .bars import Bar, say
from .evaluate import quality_rows
from .words import fact_table, model_name, spell_time

USUAL_S = {"harvest": 170.0, "train": 80.0, "eval": 60.0, "analyze": 110.0, "page": 15.0}
"""Seconds of each stage on two quiet cores; a machine's own pace is a multiple of them."""
PARTS = {
    "harvest": {"harvest": (0.15, 1.0)},
    "train": {"train": (0.15, 0.85)},
    "eval": {"on the store": (0.05, 0.3), "in the model": (0.35, 1.0)},
    "analyze": {
        "reading heads": (0.05, 0.2),
        "sources of examples": (0.2, 0.3),
        "checking types": (0.5, 0.95),
    },
    "page": {"heads": (0.0, 1.0)},
}
"""Parts of a stage that report how far they are, and the share of the stage that each is."""
PRIOR_S = 10.0
"""Seconds for which the usual pace counts, beside what is seen."""


class DemoDisplay(Bar):
    """Shows the stages one after another, with one time left for all that is still to do."""

    def __init__(self) -> None:
        super().__init__("demo")
        self._stage = ""
        self._pace = Pace(USUAL_S)

    def __call__(self, stage: str, event: Any) -> None:
        """Show an event of a stage; None begins it."""
        if stage != self._stage:
            self._stage = stage
            self._pace.begin(stage)
            label = f"{list(USUAL_S).index(stage) + 1}/{len(USUAL_S)} {stage}"
            say(f"{label}: about {spell_time(self._pace.left())} left in all")
            self.begin(label)
        if isinstance(event, str):
            say(event)
        elif (found := _progress(stage, event)) is not None:
            if (share := _share(stage, found)) is not None:
                self._pace.reach(stage, share)
            note = f"{found.tokens_per_second:,.0f} tokens/s" if found.tokens_per_second else ""
            if found.what != stage:
                note = f"{found.what}  {note}"
            self.update(found.done, found.total, note, self._pace.left())


class Pace:
    """Time left of stages that usually take so many seconds, at the pace of this machine."""

    def __init__(self, usual_s: dict[str, float]) -> None:
        self._usual_s = usual_s
        self._shares = dict.fromkeys(usual_s, 0.0)
        self._began = 0.0
        self._first: float | None = None
        self._spent = self._done = 0.0  # seconds of stages that ended, and what they usually take
        self._now = (0.0, 0.0)  # the same of the stage at hand

    def begin(self, stage: str) -> None:
        """Begin a stage; those before it are over."""
        self._spent, self._done = self._spent + self._now[0], self._done + self._now[1]
        self._now, self._first, self._began = (0.0, 0.0), None, time.monotonic()
        for each in self._usual_s:
            if each == stage:
                break
            self._shares[each] = 1.0

    def reach(self, stage: str, share: float) -> None:
        """Note how far a stage is, 0..1; one that goes on from before did not do all of it now."""
        if self._first is None:
            self._first, self._began = share, time.monotonic()
        self._shares[stage] = share
        worked = (share - self._first) * self._usual_s[stage]
        self._now = (time.monotonic() - self._began, worked)

    def share(self, stage: str) -> float:
        """Return how far a stage is."""
        return self._shares[stage]

    def left(self) -> float:
        """Return the seconds that are left."""
        spent, done = self._spent + self._now[0], self._done + self._now[1]
        pace = (spent + PRIOR_S) / (done + PRIOR_S)
        rest = sum(self._usual_s[each] * (1 - share) for each, share in self._shares.items())
        return rest * pace


def _progress(stage: str, event: Any) -> Measured | None:
    """Return how far an event says that a part of a stage is; None if it does not."""
    if stage == "harvest":
        from ..harvest.events import Progress

        if isinstance(event, Progress):
            return Measured(event.tokens, event.n_tokens, stage, event.tokens_per_second)
    elif stage == "train":
        from ..train.report.events import StepReport

        if isinstance(event, StepReport):
            return Measured(event.tokens, event.train_tokens, stage, event.tokens_per_second)
    return event if isinstance(event, Measured) else None


def _share(stage: str, part: Measured) -> float | None:
    """Return how much of a stage is done, 0..1; None in a part of which it is not known."""
    for name, (first, last) in PARTS[stage].items():
        if name in part.what:
            return first + (last - first) * part.done / max(part.total, 1)
    return None


def demo_table(result: dict[str, Any]) -> RenderableType:
    """Return what the demo made, and heads by name with a context each."""
    trained, measured = result["train"], result["eval"]
    rows = {
        "model": f"{model_name(result['harvest']['model'])}, layer {measured['layer']}",
        "trained on": f"{trained['train_tokens']:,} tokens",
        "heads": f"{trained['n_ov_heads']:,}, of which {trained['top_k']} fire on a token",
        **{name: quality_rows(measured)[name] for name in ("FVU", "loss recovered")},
        "run": trained["run"],
        "page": result["page"]["file"],
        "time": spell_time(result["seconds"]),
    }
    return Group(fact_table("a Lorsa of SmolLM2-135M-Instruct", rows), *_heads(result["heads"]))


def _heads(heads: list[dict[str, Any]]) -> list[RenderableType]:
    """Return heads in words, each with a context."""
    if not heads:
        return [Text("No head of it can be called by name on so few tokens.\n")]
    shown: list[RenderableType] = []
    for head in heads:
        shown.append(f"[bold]head {head['head']}[/], {head['type'].replace('_', '-')}")
        shown.append(Padding(escape(printable(head["sentence"])), (0, 0, 0, 2)))
        shown.append(Padding(escape(printable(head["context"] or "")), (0, 0, 1, 2)))
    shown.append("[dim]<> where it fires, [ ] what it reads[/]\n")
    return shown
