"""lorsa harvest."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from .common import IS_MAIN, ConfigFile, Device, Json, given_options, perform
from .settings import make_config


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
    given = given_options(locals(), besides={"dry_run"})

    def work() -> dict[str, Any]:
        from ..display.harvest import HarvestDisplay
        from ..harvest.config import HarvestConfig
        from ..harvest.harvest import harvest as run
        from ..harvest.harvest import plan_harvest, stored_request

        with HarvestDisplay(shows_plan=not dry_run) as display:  # then it is the result
            asked = make_config(HarvestConfig, given, config)
            stored = stored_request(asked.store)
            settings = make_config(HarvestConfig, given, config, otherwise=stored)
            report = display if IS_MAIN else lambda event: None
            if IS_MAIN:
                display.taken_over(asked, settings)
            return asdict((plan_harvest if dry_run else run)(settings, report=report))

    perform("plan" if dry_run else "harvest", work, as_json)
