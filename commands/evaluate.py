"""lorsa eval and ablate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Json, given_options, perform
from .settings import make_config


def evaluate(
    run: Annotated[list[Path], typer.Argument(help="Run folders, such as runs/layer-12.")],
    store: Annotated[str, typer.Option(help="Store with their layers.")],
    model: Annotated[
        str | None, typer.Option(help="Language model, for cross-entropies; as for harvest.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens for FVU.", show_default="all")
    ] = None,
    ce_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens for cross-entropies.", show_default="16384")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure Lorsas on held-out data and, with --model, inside the language model.

    Of several runs each is measured alone, and then the model with all their layers replaced.

    Example: lorsa eval runs/layer-12 --store ./acts --model smollm2-135m
    """
    given = given_options(locals(), besides={"run"})

    def work() -> dict[str, Any]:
        from ..display.features import AnalyzeDisplay
        from ..evaluate.config import EvalConfig
        from ..evaluate.evaluate import evaluate_runs

        configs = [make_config(EvalConfig, {**given, "run": folder}) for folder in run]
        with AnalyzeDisplay("eval") as display:
            found = evaluate_runs(configs, report=display)
        return found.runs[0].to_dict() if len(run) == 1 else found.to_dict()

    perform("eval", work, as_json)
