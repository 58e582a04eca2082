"""lorsa analyze, find, explain and view: what each head does."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..analyze.choices import KINDS
from ..analyze.type_names import spelled, type_named
from ..errors import UsageError
from ..store.choices import DEFAULT_STORE
from . import completing
from .common import Device, Json, chosen_layers, layers_of_store, perform
from .following import following
from .options import FromConfig, Given
from .remembered import MODEL_OF_RUN, STORE_OF_RUN, remember
from .settings import make_config

EXAMPLES = {"n_top": ("--top",), "n_samples": ("--samples",)}


def analyze(
    given: Annotated[
        Given,
        FromConfig(
            "analyze.config.AnalyzeConfig",
            arguments=("run",),
            names=EXAMPLES,
            defaults=STORE_OF_RUN | MODEL_OF_RUN,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Find out what each head of a Lorsa does: where it fires, what it reads and writes.

    The same command goes on where an earlier one was stopped.

    Example: lorsa analyze runs/layer-12

    Example: lorsa analyze runs/layer-12 --tokens 65536 --top 24

    Example: lorsa analyze runs/layer-12 --model smollm2-135m --device cuda
    """

    def work() -> dict[str, Any]:
        from ..analyze.config import AnalyzeConfig
        from ..analyze.features import analyze_run
        from ..display.bars import MeasureBar

        settings = make_config(AnalyzeConfig, remember(given, [given["run"]], store=True))
        with MeasureBar("analyze") as display:
            facts = analyze_run(settings, report=display)
        seen = settings.run if settings.out is None else settings.out
        return facts | {"next": following("view", seen, "--open")}

    perform("analyze", work, as_json)


Type = Annotated[
    str,
    typer.Argument(
        metavar="TYPE",
        autocompletion=completing.types,
        help=f"{', '.join(map(spelled, KINDS[:-1]))} or {KINDS[-1]}.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers", "--layer", help="0-27, 3,7,12 or all.", autocompletion=completing.layers
    ),
]


def find(
    kind: Type,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Analysed runs; without any, the language model's own heads.",
            autocompletion=completing.runs,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Store whose own heads are scored; with runs, the one they must be of.",
            show_default="acts; with runs none",
            autocompletion=completing.stores,
        ),
    ] = None,
    layers: Layers = None,
    n: Annotated[int, typer.Option("--top", help="Heads to print.", min=1)] = 10,
    least: Annotated[
        float,
        typer.Option(help="Score from which on a head is of the type; 0 takes any.", min=0, max=1),
    ] = 0.5,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the heads that are most of a type, with examples as evidence.

    Score: the share of its reading that is of the type, by a lower bound; of text and probes, the
    smaller.

    Example: lorsa find induction runs/layer-12

    Example: lorsa find previous-token runs/layer-12 runs/layer-17 --top 20

    Example: lorsa find induction --store ./acts --layers 0-27
    """

    def work() -> dict[str, Any]:
        from ..analyze.found import find_in_runs

        try:
            name = type_named(kind)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if runs:
            chosen = None if layers is None else _layers_of_runs(runs, layers)
            best = find_in_runs(name, runs, store=store, layers=chosen, n=n, least=0)
        else:
            best = _own_heads(name, store, layers, n, device)
        heads = [asdict(head) for head in best if head.score >= least]
        facts = {"type": spelled(name), "least": least, "best": best[0].score, "heads": heads}
        facts["measured_on"] = best[0].measured_on
        return facts | {"next": following("view", runs[0], "--open") if runs else None}

    perform("find", work, as_json)


def _own_heads(
    kind: str, store: str | None, layers: str | None, n: int, device: str | None
) -> list[Any]:
    """Return the best of the language model's own heads, as `FoundHead`."""
    from ..analyze.find import find_heads

    chosen = None if layers is None else layers_of_store(store or DEFAULT_STORE, layers)
    return find_heads(kind, store=store, layers=chosen, n=n, least=0, device=device or "auto")


def _layers_of_runs(runs: list[Path], layers: str) -> list[int]:
    """Return the layers that are meant, of those that were analysed."""
    from ..analyze.result import Analysis

    have = [Analysis.open(run).facts["layer"] for run in runs]
    return chosen_layers(layers, have, where="the runs")


def explain(
    given: Annotated[
        Given,
        FromConfig(
            "analyze.explain.config.ExplainConfig",
            arguments=("run",),
            names={"model": ("--llm", "--model")},
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate, even with --yes.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Send; without it there is only an estimate.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let a language model describe heads by their examples, and score what it says.

    Nothing is sent without --yes. The key comes from LORSA_API_KEY or OPENAI_API_KEY. The same
    command goes on where an earlier one was stopped.

    Example: lorsa explain runs/layer-12 --endpoint http://127.0.0.1:8080/v1 --llm qwen3-8b

    Example: lorsa explain runs/layer-12 --endpoint https://host/v1 --llm gpt-5-mini --top 50

    Example: lorsa explain runs/layer-12 --endpoint https://host/v1 --llm qwen3-8b --heads 17 --yes
    """

    def work() -> dict[str, Any]:
        from ..analyze.explain.config import ExplainConfig
        from ..analyze.explain.explain import estimate
        from ..analyze.explain.explain import explain as ask
        from ..display.explain import ExplainDisplay

        settings = make_config(ExplainConfig, given)
        if dry_run or not yes:
            return {"sent": False, **asdict(estimate(settings))}
        with ExplainDisplay("explain") as display:
            result = ask(settings, report=display)
        follows = following("view", settings.run, "--open") if result.n_explained else None
        return {"sent": True, **asdict(result), "ok": result.n_explained > 0, "next": follows}

    perform("explain", work, as_json)


def view(
    run: Annotated[
        Path,
        typer.Argument(
            help="Run folder with an analysis: runs/layer-12.", autocompletion=completing.runs
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the page.", show_default="RUN/page")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it to this machine until Ctrl-C.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(help="Of --serve; 0 is any.", min=0, max=65535, show_default="8321"),
    ] = None,
    opens: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Make a page of a Lorsa's heads: a folder that any browser opens, without a server.

    Example: lorsa view runs/layer-12 --open

    Example: lorsa view runs/layer-12 --serve --port 0

    Example: lorsa view runs/layer-12 --out ./page-of-layer-12
    """
    servers = []

    def work() -> dict[str, Any]:
        import webbrowser

        from ..display.view import PageDisplay
        from ..view.build import build_page
        from ..view.serve import PORT, PageServer

        if port is not None and not serve:
            raise UsageError("--port does nothing without --serve; add --serve")
        with PageDisplay("page") as display:
            page = build_page(run, out, report=display)
        url = None
        if serve:
            servers.append(PageServer(page.file.parent, PORT if port is None else port))
            url = servers[0].url
        opened = webbrowser.open(url or page.file.resolve().as_uri()) if opens else None
        return {**page._asdict(), "file": str(page.file), "url": url, "opened": opened}

    perform("view", work, as_json)
    sys.stdout.flush()
    for server in servers:
        server.run()
