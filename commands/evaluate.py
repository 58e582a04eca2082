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
    """Measure dictionaries on held-out data and inside the language model.

    Of several runs, of any kinds, each is measured alone, and then the model with all of them in
    place; --no-each leaves out the model with each alone. What was measured of one run before is
    shown as it was kept.

    Example: lorsa eval runs/layer-12

    Example: lorsa eval runs/12.mlp runs/layer-12 runs/20.resid_out --ce-tokens 65536

    Example: lorsa eval runs/*.mlp --no-each

    Example: lorsa eval runs/layer-12 --model none --json
    """

    def work() -> dict[str, Any]:
        from ..display.bars import MeasureBar, say
        from ..evaluate.config import EvalConfig

        settings = remember(given, run, store=True)
        from ..evaluate.kept import kept_answer

        configs = [make_config(EvalConfig, {**settings, "run": folder}) for folder in run]
        if len(run) == 1 and not again and (kept := kept_answer(configs[0])) is not None:
            say(f"measured before, and kept in {run[0]}; --again measures anew")
            return kept | _next([kept])
        from ..evaluate.evaluate import evaluate_runs

        with MeasureBar("eval") as display:
            found = evaluate_runs(configs, report=display)
        measured = [each.to_dict() for each in found.runs]
        return (measured[0] if len(run) == 1 else found.to_dict()) | _next(measured)

    perform("eval", work, as_json)


def _next(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what comes after an evaluation: the first Lorsa's analysis, or else a look at a card.

    Other kinds are not analysed. The card is of runs that lie here, one of each place.
    """
    lorsas = [each["run"] for each in measured if each["kind"] == "lorsa"]
    if lorsas:
        return {"next": following("analyze", lorsas[0])}
    places = {(each["kind"], *each["writes"]) for each in measured}
    runs = [each["run"] for each in measured]
    if len(places) < len(runs) or not all(Path(run).is_dir() for run in runs):
        return {"next": None}
    return {"next": following("push", *runs, "--repo", "./shared", "--dry-run")}
