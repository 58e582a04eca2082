"""Demo: from a language model that comes in a Python package to a page of heads with names."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .analyze.config import AnalyzeConfig
from .dictionaries.choices import WEIGHTS
from .evaluate.config import EvalConfig
from .harvest.config import HarvestConfig
from .language.aliases import DEMO_MODEL, resolve
from .progress import Measured
from .train.config import TrainConfig
from .train.origin import RUN, read_facts
from .whole import file_crc32

LAYER = 17
"""Layer of SmolLM2-135M with heads that everyone knows: induction."""
N_CTX = 256
CE_TOKENS = 4096
READ_TOKENS = 65_536
"""Tokens on which the heads are read."""
N_NAMED = 3
"""Heads that are shown by name."""
STAGES = ("harvest", "train", "eval", "analyze", "page")

Report = Callable[[str, Any], None]
"""Function that is called with a stage and what happens in it; with None as it begins."""


def run_demo(
    folder: Path, tokens: int, *, report: Report = lambda stage, event: None
) -> dict[str, Any]:
    """Harvest layer 17 of SmolLM2-135M, train a Lorsa on it, measure it, read its heads.

    What an earlier call left in the folder is used again, stage by stage.

    Args:
        folder: folder of the store and the run.
        tokens: tokens to harvest.
        report: called with each stage that has work to do, and with its events.

    Returns:
        Results of the stages, heads with names, the page, and the seconds all took, JSON-able.

    Raises:
        HarvestError: the package with the model is not installed, or a stage fails.
    """
    started = time.perf_counter()
    demo = _Demo(folder, tokens, report)
    found = {
        "harvest": demo.harvest(),
        "train": demo.train(),
        "eval": demo.measure(),
        "analyze": demo.analyze(),
        "page": demo.page(),
    }
    return found | {"heads": demo.named(), "seconds": time.perf_counter() - started}


class _Demo:
    """Stages in one folder; each returns what is there, or makes it.

    Only what has to be made imports what takes seconds to load.
    """

    def __init__(self, folder: Path, tokens: int, report: Report) -> None:
        self._model = resolve(DEMO_MODEL).id
        self._store, self._run = folder / "acts", folder / "runs" / f"layer-{LAYER}"
        self._tokens = tokens
        self._report = report
        self._facts: dict[str, Any] = {}

    def harvest(self) -> dict[str, Any]:
        """Return the facts of the store."""
        from .store.care.info import store_info
        from .store.folder import is_complete
        from .store.manifest import MANIFEST, read_manifest

        config = HarvestConfig(
            model=self._model,
            layers=str(LAYER),
            store=self._store,
            data="stdlib",
            n_ctx=N_CTX,
            tokens=self._tokens,
        )
        known = read_manifest(config.store / MANIFEST) if is_complete(config.store) else None
        if known is None or known.request != config.request() or LAYER not in known.layers:
            from .harvest.harvest import harvest

            harvest(config, report=self._begin("harvest"))
        self._facts = {
            name: fact for name, fact in store_info(config.store).items() if name != "next"
        }
        return self._facts

    def train(self) -> dict[str, Any]:
        """Return the result of the run."""
        known = read_facts(self._run / RUN)
        same_store = known.get("decisive", {}).get("store_uuid") == self._facts["uuid"]
        if known.get("result") and same_store:
            return {**known["result"], "run": str(self._run)}
        from .train.train import train

        config = TrainConfig(store=self._store, layer=LAYER, out=self._run)
        return asdict(train(config, report=self._begin("train")))

    def measure(self) -> dict[str, Any]:
        """Return the quality of the run."""
        from .evaluate.kept import kept_answer

        config = EvalConfig(
            run=self._run, store=self._store, model=self._model, ce_tokens=CE_TOKENS
        )
        if (known := kept_answer(config)) is not None:
            return known
        from .evaluate.evaluate import evaluate_run

        return evaluate_run(config, report=self._begin("eval")).to_dict()

    def analyze(self) -> dict[str, Any]:
        """Return the facts of the analysis."""
        from .analyze.result import Analysis
        from .analyze.schema import FACTS_FILE, VERSION

        config = AnalyzeConfig(
            run=self._run, store=self._store, model=self._model, tokens=READ_TOKENS
        )
        asked = {
            "version": VERSION,
            "weights_crc32": file_crc32(self._run / WEIGHTS),
            "store_uuid": self._facts["uuid"],
            "n_seqs": min(READ_TOKENS // N_CTX, self._facts["n_seq"]),
            "model": self._model,
        }
        known = read_facts(config.folder / FACTS_FILE).get("request", {})
        if {name: known.get(name) for name in asked} == asked:
            facts = Analysis.open(config.folder).facts
            return {name: fact for name, fact in facts.items() if name != "version"}
        from .analyze.features import analyze_run

        return analyze_run(config, report=self._begin("analyze"))

    def page(self) -> dict[str, Any]:
        """Return the file of the page and its size."""
        from .view.build import build_page

        def report(done: int, total: int) -> None:
            self._report("page", Measured(done, total, "heads"))

        page = build_page(self._run, report=report)
        return {**page._asdict(), "file": str(page.file)}

    def named(self) -> list[dict[str, Any]]:
        """Return heads that can be called by name, the best of each type first."""
        from .analyze.named import named_heads

        return [asdict(head) for head in named_heads(self._run, N_NAMED)]

    def _begin(self, stage: str) -> Callable[[Any], None]:
        """Report that a stage begins; return what its events are reported to."""
        self._report(stage, None)
        return lambda event: self._report(stage, event)
