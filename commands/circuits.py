"""lorsa ablate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LorsaError
from .common import Json, perform
from .options import FromConfig, Given
from .remembered import NEEDED_MODEL, remember
from .settings import make_config

HEADS_HELP = "Heads to change: 17,301 or 0-7; or a type, such as induction: all of an analysed run."


def ablate(
    given: Annotated[
        Given,
        FromConfig("circuits.config.AblateConfig", arguments=("run",), defaults=NEEDED_MODEL),
    ],
    heads: Annotated[str, typer.Option(help=HEADS_HELP)],
    as_json: Json = False,
) -> None:
    """Ablate or scale heads in the language model, and see what it then predicts for a prompt.

    Where none of the heads fires on the prompt nothing would change: a line names the heads that
    do, and the exit code is 1.

    Example: lorsa ablate runs/layer-17 --heads induction --prompt "The set-up is a new set"

    Example: lorsa ablate runs/layer-17 --heads 17,301 --scale 2 --prompt "Once upon a time"

    Example: lorsa ablate runs/layer-17 --heads 0-7 --tokens 1,2,3,1,2 --json
    """

    def work() -> dict[str, Any]:
        from ..circuits.ablate import ablate as change
        from ..circuits.config import AblateConfig
        from ..display.bars import MeasureBar

        run = Path(given["run"])
        settings = {**given, "heads": _of_type(run, heads)}
        config = make_config(AblateConfig, remember(settings, [run], needs_model=True))
        with MeasureBar("ablate") as display:
            found = change(config, report=display)
        if config.value is None and found.silent == found.heads:
            raise LorsaError(_nothing_fires(len(found.heads), found.strongest))
        return found.to_dict()

    perform("ablate", work, as_json)


def _of_type(run: Path, heads: str) -> str:
    """Return the ids of all heads of a type, or the ids that were given."""
    name = heads.replace("-", "_")
    if not name.isidentifier():  # numbers, of which most requests are
        return heads
    from ..analyze.result import Analysis
    from ..analyze.schema import TYPES

    if name not in TYPES:
        return heads
    table = Analysis.open(run).heads
    types = table["type"].to_pylist()
    found = [str(head) for head in range(table.num_rows) if types[head] == name]
    if not found:
        raise LorsaError(f"{run} has no head of type {heads}; lorsa find shows the nearest")
    return ",".join(found)


def _nothing_fires(n_heads: int, strongest: dict[int, float]) -> str:
    """Return the line of a request that would change nothing."""
    which = "this head does not fire" if n_heads == 1 else f"none of the {n_heads} heads fires"
    others = ", ".join(map(str, strongest)) or "none"
    return f"{which} on this prompt, so nothing changes; strongest at its last token: {others}"
