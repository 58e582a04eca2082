"""lorsa eval."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import completing
from .common import Json, perform
from .following import following
from .options import FromConfig, Given
from .remembered import MODEL_OF_RUN, STORE_OF_RUN, remember
from .settings import make_config


def evaluate(
    given: Annotated[
        Given, FromConfig("evaluate.config.EvalConfig", defaults=STORE_OF_RUN | MODEL_OF_RUN)
    ],
    run: Annotated[
        list[Path],
        typer.Argument(help="Run folders, such as runs/layer-12.", autocompletion=completing.runs),
    ],
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what was measured before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure Lorsas on held-out data and inside the language model.

    Of several runs each is measured alone, and then the model with all their layers replaced. What
    was measured of one run before is shown as it was kept.

    Example: lorsa eval runs/layer-12

    Example: lorsa eval runs/layer-3 runs/layer-12 --ce-tokens 65536

    Example: lorsa eval runs/layer-12 --model none --json
    """

    def work() -> dict[str, Any]:
        from ..display.bars import MeasureBar, say
        from ..evaluate.config import EvalConfig

        settings = remember(given, run, store=True)
        from ..evaluate.kept import kept_answer

        configs = [make_config(EvalConfig, {**settings, "run": folder}) for folder in run]
        follows = {"next": following("analyze", run[0])}
        if len(run) == 1 and not again and (kept := kept_answer(configs[0])) is not None:
            say(f"measured before, and kept in {run[0]}; --again measures anew")
            return kept | follows
        from ..evaluate.evaluate import evaluate_runs

        with MeasureBar("eval") as display:
            found = evaluate_runs(configs, report=display)
        return (found.runs[0].to_dict() if len(run) == 1 else found.to_dict()) | follows

    perform("eval", work, as_json)
