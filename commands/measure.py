"""lorsa eval and ablate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..settings import make_config
from .common import Device, Json, given_options, perform


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
        from ..analyze import EvalConfig, evaluate_runs
        from ..display import AnalyzeDisplay

        configs = [make_config(EvalConfig, {**given, "run": folder}) for folder in run]
        with AnalyzeDisplay("eval") as display:
            found = evaluate_runs(configs, report=display)
        return found.runs[0].to_dict() if len(run) == 1 else found.to_dict()

    perform("eval", work, as_json)


def ablate(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/layer-12.")],
    heads: Annotated[str, typer.Option(help="Heads to change: 17,301 or 0-7.")],
    model: Annotated[str, typer.Option(help="Its language model; as for harvest.")],
    prompt: Annotated[str | None, typer.Option(help="Text that the model reads.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Token ids in place of a prompt: 5,17,301.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor of the activations.", show_default="0: ablated")
    ] = None,
    value: Annotated[
        float | None, typer.Option(help="Activation at every token, in place of a factor.")
    ] = None,
    error: Annotated[
        str | None,
        typer.Option(help="What the Lorsa misses: keep or drop it.", show_default="keep"),
    ] = None,
    top: Annotated[int | None, typer.Option(help="Next tokens shown.", show_default="10")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ablate or scale heads in the language model, and see what it then predicts for a prompt.

    Example: lorsa ablate runs/layer-12 --heads 17,301 --model smollm2-135m --prompt "Once upon"
    """
    given = given_options(locals())

    def work() -> dict[str, Any]:
        from ..analyze import AblateConfig
        from ..analyze import ablate as change
        from ..display import say

        return change(make_config(AblateConfig, given), report=say).to_dict()

    perform("ablate", work, as_json)
