"""lorsa ablate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Json, given_options, perform
from .settings import make_config


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
        from ..circuits.ablate import ablate as change
        from ..circuits.config import AblateConfig
        from ..display.bars import say

        return change(make_config(AblateConfig, given), report=say).to_dict()

    perform("ablate", work, as_json)
