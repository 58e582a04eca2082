"""lorsa eval."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import completing
from .common import Json, perform
from .options import FromConfig, Given
from .settings import make_config


def evaluate(
    given: Annotated[Given, FromConfig("evaluate.config.EvalConfig")],
    run: Annotated[
        list[Path],
        typer.Argument(help="Run folders, such as runs/layer-12.", autocompletion=completing.runs),
    ],
    as_json: Json = False,
) -> None:
    """Measure Lorsas on held-out data and, with --model, inside the language model.

    Of several runs each is measured alone, and then the model with all their layers replaced.

    Example: lorsa eval runs/layer-12 --store ./acts --model smollm2-135m
    """

    def work() -> dict[str, Any]:
        from ..display.bars import MeasureBar
        from ..evaluate.config import EvalConfig
        from ..evaluate.evaluate import evaluate_runs

        configs = [make_config(EvalConfig, {**given, "run": folder}) for folder in run]
        with MeasureBar("eval") as display:
            found = evaluate_runs(configs, report=display)
        return found.runs[0].to_dict() if len(run) == 1 else found.to_dict()

    perform("eval", work, as_json)
