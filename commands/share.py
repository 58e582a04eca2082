"""lorsa convert and push: Lorsas for others, and from them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, given_options, perform
from .settings import make_config


def exchange(
    source: Annotated[
        str,
        typer.Argument(help="Lorsa of any format: a run folder, one of another tool, a Hub id."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    subfolder: Annotated[
        str | None,
        typer.Option(help="Which Lorsa of several: layer-12.", show_default="the only one"),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the Hub.", show_default="main"),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="lorsa or llamascopium.", show_default="lorsa")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Language model whose norm is folded in or out; as for harvest."),
    ] = None,
    weighted: Annotated[
        bool | None,
        typer.Option(
            "--weighted",
            help="The other tool loaded the model without processing: a LayerNorm's hook is after "
            "its weight.",
        ),
    ] = None,
    max_l0: Annotated[
        int | None,
        typer.Option(
            help="Heads that may fire on a token at most, of batchtopk and jumprelu.",
            show_default="as it was",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a Lorsa in another tool's format, or one of another tool in ours.

    Read are lorsa, Llamascopium (lm-saes) and OpenMOSS/Lorsa folders. What cannot be expressed is
    an error that names the setting.

    Example: lorsa convert ./their-lorsa runs/layer-12 --model smollm2-135m

    Example: lorsa convert owner/lorsas-smollm2 runs/layer-12 --subfolder layer-12
    """
    given = given_options(locals())

    def work() -> dict[str, Any]:
        from ..display.bars import say
        from ..exchange.config import ConvertConfig
        from ..exchange.convert import convert

        return convert(make_config(ConvertConfig, given), report=say).to_dict()

    perform("convert", work, as_json)


def push(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs, such as runs/layer-12.")],
    repo: Annotated[
        str, typer.Option(help="Repository on the Hugging Face Hub, owner/name, or a ./folder.")
    ],
    private: Annotated[
        bool | None, typer.Option("--private", help="If the repository is made, make it private.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if need be.", show_default="main")
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Of the commit.", show_default="the layers")
    ] = None,
    license: Annotated[  # noqa: A002
        str | None,
        typer.Option(help="Identifier of a license: mit.", show_default="as it is, or none"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the model card and the files.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Share Lorsas on the Hugging Face Hub, with a model card; anyone loads them by the name.

    A layer that is there already is replaced, the others stay. The token is that of hf auth login,
    or HF_TOKEN.

    Example: lorsa push runs/layer-12 --repo me/lorsas-smollm2
    """
    given = given_options(locals(), besides={"dry_run"})

    def work() -> dict[str, Any]:
        from ..display.bars import say
        from ..publish.config import PushConfig
        from ..publish.push import push as share

        settings = make_config(PushConfig, given)
        return asdict(share(settings, dry_run=dry_run, report=say))

    perform("push", work, as_json)
