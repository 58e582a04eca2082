"""lorsa store: info, verify, rm and merge."""

from typing import Annotated, Any

import typer

from ..errors import UsageError
from . import completing
from .common import Json, perform

Store = Annotated[str, typer.Argument(help="Activation store.", autocompletion=completing.stores)]


def info(
    store: Annotated[
        str, typer.Argument(help="Activation store.", autocompletion=completing.stores)
    ],
    as_json: Json = False,
) -> None:
    """Show what a store holds, whether it is complete, and how to go on if it is not.

    Example: lorsa store info ./acts

    Example: lorsa store info s3://bucket/acts

    Example: lorsa store info ./acts --json
    """

    def work() -> dict[str, Any]:
        from ..store.care.info import store_info

        return store_info(store)

    perform("store info", work, as_json)


def verify(
    store: Annotated[
        str, typer.Argument(help="Activation store.", autocompletion=completing.stores)
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte and compare its checksum.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Drop damaged shards, so that harvest writes them again."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Look for everything that is wrong with a store; exit code 1 if there is anything.

    Without --full: is everything there, with the right sizes and metadata?

    Example: lorsa store verify ./acts --full

    Example: lorsa store verify ./acts

    Example: lorsa store verify ./acts --full --repair
    """

    def work() -> dict[str, Any]:
        from ..display.store import CareDisplay
        from ..store.care.repair import verify_store

        with CareDisplay("verify") as display:
            return verify_store(store, full=full, repair=repair, report=display)

    perform("store verify", work, as_json)


def remove(
    store: Annotated[
        str, typer.Argument(help="Activation store.", autocompletion=completing.stores)
    ],
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to remove: 0-27 or 3,7,12.", autocompletion=completing.layers),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Sites of these layers, or of all: mlp,resid_in, or 3.mlp_in."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove layers or sites from a store and free their bytes; all others stay as they are.

    Example: lorsa store rm ./acts --layers 3,5

    Example: lorsa store rm ./acts --sites mlp --layers 0-11

    Example: lorsa store rm s3://bucket/acts --layers 27 --json
    """

    def work() -> dict[str, Any]:
        from ..store.care.remove import remove_sites

        if layers is None and sites is None:
            raise UsageError("nothing to remove was named; give --layers, --sites (mlp), or both")
        return remove_sites(store, layers or "all", sites or "all")

    perform("store rm", work, as_json)


def merge(
    stores: Annotated[
        list[str],
        typer.Argument(
            help="Two or more stores; they stay as they are.", autocompletion=completing.stores
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the new store, or s3://bucket/folder.")],
    as_json: Json = False,
) -> None:
    """Make one store of several of the same model, layers and length, but different text.

    Held-out sequences stay held out. The same command goes on where an earlier one was stopped.

    Example: lorsa store merge ./acts-a ./acts-b --out ./acts

    Example: lorsa store merge ./acts-a ./acts-b ./acts-c --out s3://bucket/acts

    Example: lorsa store merge ./part-* --out ./acts --json
    """

    def work() -> dict[str, Any]:
        from ..display.store import CareDisplay
        from ..store.care.merge import merge_stores

        with CareDisplay("merge") as display:
            return merge_stores(stores, out, report=display)

    perform("store merge", work, as_json)
