"""lorsa ablate and trace."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LorsaError
from . import completing
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


def trace(
    given: Annotated[
        Given, FromConfig("circuits.tracing.config.TraceConfig", defaults=NEEDED_MODEL)
    ],
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders of dictionaries, each of another place: Lorsas, transcoders, SAEs.",
            autocompletion=completing.runs,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Trace a prompt through dictionaries: which features made the model say this.

    Attention and MLPs without a dictionary stay the model's own. The graph goes to a folder, with
    a file for other tools' pages in it; asked again, it is shown as it was kept.

    Example: lorsa trace runs/* --prompt "The capital of France is"

    Example: lorsa trace runs/layer-12 runs/12.mlp --prompt "Once upon a" --target " time" --json

    Example: lorsa trace runs/* --tokens-file ids.txt --target feature:12.mlp/301 --name unit-301
    """

    def work() -> dict[str, Any]:
        from ..circuits.tracing.config import TraceConfig
        from ..display.bars import MeasureBar

        settings = {**given, "runs": tuple(runs)}
        config = make_config(TraceConfig, remember(settings, runs, needs_model=True))
        from ..circuits.tracing.told import told
        from ..circuits.tracing.trace import trace as follow

        with MeasureBar("trace") as display:
            return told(*follow(config, report=display))

    perform("trace", work, as_json)


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
