"""lorsa convert and push: Lorsas for others, and from them."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from .common import Json, perform
from .options import FromConfig, Given
from .settings import make_config


def exchange(
    given: Annotated[
        Given, FromConfig("exchange.config.ConvertConfig", arguments=("source", "out"))
    ],
    as_json: Json = False,
) -> None:
    """Write a Lorsa in another tool's format, or one of another tool in ours.

    Read are lorsa, Llamascopium (lm-saes) and OpenMOSS/Lorsa folders. What cannot be expressed is
    an error that names the setting.

    Example: lorsa convert ./their-lorsa runs/layer-12 --model smollm2-135m

    Example: lorsa convert owner/lorsas-smollm2 runs/layer-12 --subfolder layer-12
    """

    def work() -> dict[str, Any]:
        from ..display.bars import say
        from ..exchange.config import ConvertConfig
        from ..exchange.convert import convert

        return convert(make_config(ConvertConfig, given), report=say).to_dict()

    perform("convert", work, as_json)


def push(
    given: Annotated[Given, FromConfig("publish.config.PushConfig", arguments=("runs",))],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the model card and the files.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Share Lorsas on the Hugging Face Hub, with a model card; anyone loads them by the name.

    A layer that is there already is replaced, the others stay. The token is that of hf auth login,
    or HF_TOKEN.

    Example: lorsa push runs/layer-12 --repo me/lorsas-smollm2

    Example: lorsa push runs/layer-3 runs/layer-12 --repo me/lorsas-smollm2 --private --license mit

    Example: lorsa push runs/layer-12 --repo ./shared --dry-run
    """

    def work() -> dict[str, Any]:
        from ..display.bars import say
        from ..publish.config import PushConfig
        from ..publish.push import push as share

        settings = make_config(PushConfig, given)
        return asdict(share(settings, dry_run=dry_run, report=say))

    perform("push", work, as_json)
