"""lorsa ablate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LorsaError
from .common import Json, perform
from .options import FromConfig, Given
from .remembered import NEEDED_MODEL, remember
from .settings import make_config

if TYPE_CHECKING:
    from ..circuits.ablate import Ablation

FEATURES_HELP = (
    "Features to change, of a Lorsa heads: 17,301 or 0-7; or a type of heads, such as induction: "
    "all of an analysed run."
)


def ablate(
    given: Annotated[
        Given,
        FromConfig("circuits.config.AblateConfig", arguments=("run",), defaults=NEEDED_MODEL),
    ],
    features: Annotated[str, typer.Option("--features", "--heads", help=FEATURES_HELP)],
    as_json: Json = False,
) -> None:
    """Ablate or scale features in the language model, and see what it then predicts for a prompt.

    A Lorsa's features are its heads. Where none of them fires on the prompt nothing would change: a
    line names those that do, and the exit code is 1.

    Example: lorsa ablate runs/layer-17 --heads induction --prompt "The set-up is a new set"

    Example: lorsa ablate runs/layer-17 --heads 17,301 --scale 2 --prompt "Once upon a time"

    Example: lorsa ablate runs/12.mlp --features 0-7 --tokens 1,2,3,1,2 --json
    """

    def work() -> dict[str, Any]:
        from ..circuits.ablate import ablate as change
        from ..circuits.config import AblateConfig
        from ..display.bars import MeasureBar

        run = Path(given["run"])
        settings = {**given, "features": _of_type(run, features)}
        config = make_config(AblateConfig, remember(settings, [run], needs_model=True))
        with MeasureBar("ablate") as display:
            found = change(config, report=display)
        if config.value is None and found.silent == found.features:
            raise LorsaError(_nothing_fires(found))
        return found.to_dict()

    perform("ablate", work, as_json)


def _of_type(run: Path, features: str) -> str:
    """Return the ids of all heads of a type, or the ids that were given."""
    name = features.replace("-", "_")
    if not name.isidentifier():  # numbers, of which most requests are
        return features
    from ..analyze.result import Analysis
    from ..analyze.schema import TYPES

    if name not in TYPES:
        return features
    table = Analysis.open(run).heads
    types = table["type"].to_pylist()
    found = [str(head) for head in range(table.num_rows) if types[head] == name]
    if not found:
        raise LorsaError(f"{run} has no head of type {features}; lorsa find shows the nearest")
    return ",".join(found)


def _nothing_fires(found: "Ablation") -> str:
    """Return the line of a request that would change nothing."""
    n, unit = len(found.features), "head" if found.kind == "lorsa" else "feature"
    which = f"this {unit} does not fire" if n == 1 else f"none of the {n} {unit}s fires"
    others = ", ".join(map(str, found.strongest)) or "none"
    return f"{which} on this prompt, so nothing changes; strongest at its last token: {others}"
