"""lorsa verify: whether files are what was written."""

from typing import Annotated, Any

import typer

from .common import Json, perform


def verify(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Stores, runs, analyses, traces, pages, dictionaries, or folders with some.",
        ),
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte of stores too, not their sizes alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare files with what was written; exit code 1, and each file named, if one is not that.

    Example: lorsa verify runs/layer-12

    Example: lorsa verify ./acts ./runs --full

    Example: lorsa verify ./lorsas-smollm2 --json
    """

    def work() -> dict[str, Any]:
        from ..display.store import CareDisplay
        from ..verify import verify_paths

        with CareDisplay("verify") as display:
            return verify_paths(paths, full=full, report=display)

    perform("verify", work, as_json)
