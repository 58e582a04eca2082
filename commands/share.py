"""lorsa convert and push: dictionaries for others, and from them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, perform
from .options import FromConfig, Given
from .remembered import MODEL_OF_RUN, remember
from .settings import make_config


def exchange(
    given: Annotated[
        Given,
        FromConfig(
            "exchange.config.ConvertConfig", arguments=("source", "out"), defaults=MODEL_OF_RUN
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write a Lorsa in another tool's format, or a dictionary in ours.

    Read are lorsa, Llamascopium (lm-saes) and OpenMOSS/Lorsa folders. What cannot be expressed is
    an error that names the setting.

    Example: lorsa convert ./their-lorsa runs/layer-12 --model smollm2-135m

    Example: lorsa convert runs/layer-12 ./for-llamascopium --to llamascopium

    Example: lorsa convert owner/lorsas-smollm2 runs/layer-12 --subfolder layer-12
    """

    def work() -> dict[str, Any]:
        from ..display.bars import MeasureBar
        from ..exchange.config import ConvertConfig
        from ..exchange.convert import convert

        config = make_config(ConvertConfig, _with_model(given))
        with MeasureBar("convert") as display:
            return convert(config, report=display).to_dict()

    perform("convert", work, as_json)


def _with_model(given: Given) -> Given:
    """Return settings with the Lorsa's language model where its norm has to be folded."""
    from ..exchange.config import TARGETS
    from ..train.origin import facts_of

    folder = Path(given["source"], given.get("subfolder", ""))
    facts = facts_of(folder)
    reads_x = facts.get("hook_in") is None
    if "n_features" in facts:  # of another kind than a Lorsa, into which no norm is folded
        return given
    if not given.get("model") and reads_x == (given.get("to", TARGETS[0]) == TARGETS[0]):
        return given
    return remember(given, [folder])


def push(
    given: Annotated[Given, FromConfig("publish.config.PushConfig", arguments=("runs",))],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the model card and the files.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Share dictionaries on the Hugging Face Hub with a model card; anyone loads them by the name.

    One of the same layer and site that is there already is replaced, the others stay. The token is
    that of hf auth login, or HF_TOKEN.

    Example: lorsa push runs/layer-12 --repo me/lorsas-smollm2

    Example: lorsa push runs/12.mlp runs/layer-12 --repo me/lorsas-smollm2 --private --license mit

    Example: lorsa push runs/layer-12 --repo ./shared --dry-run
    """

    def work() -> dict[str, Any]:
        from ..display.bars import MeasureBar
        from ..publish.config import PushConfig

        settings = make_config(PushConfig, given)
        with MeasureBar("push") as display:
            display(f"reading {', '.join(map(str, settings.runs))}")  # before torch is loaded
            from ..publish.push import push as share

            return asdict(share(settings, dry_run=dry_run, report=display))

    perform("push", work, as_json)
