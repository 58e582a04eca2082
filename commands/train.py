"""lorsa train and sweep."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import IS_MAIN, ConfigFile, Device, Json, chosen_layers, given_options, perform
from .settings import make_config, make_grid

Store = Annotated[str, typer.Option(help="Activation store: its folder, or s3://bucket/folder.")]
Layers = Annotated[
    str | None,
    typer.Option("--layers", "--layer", help="0-27, 3,7,12 or all.", show_default="all stored"),
]


def train(
    store: Store,
    layers: Layers = None,
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
    given = given_options(locals(), besides={"layers", "out", "apart"})

    def work() -> dict[str, Any]:
        from ..display.train import TrainDisplay
        from ..display.watch import SweepDisplay
        from ..train.config import TrainConfig
        from ..train.train import require_trainable, train_many

        all_settings = [
            make_config(TrainConfig, {**given, "layer": n, "out": out / f"layer-{n}"}, config)
            for n in chosen_layers(store, layers)
        ]
        for settings in all_settings:  # what is wrong with the last is said before the first
            require_trainable(settings)
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

    perform("train", work, as_json)


def sweep(
    store: Store,
    layers: Layers = None,
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
    given = given_options(locals(), besides={"store", "layers", "out", "others", "apart"})

    def work() -> dict[str, Any]:
        from ..display.watch import SweepDisplay
        from ..train.config import TrainConfig
        from ..train.sweep import points, write_sweep
        from ..train.sweep import sweep as run

        chosen = ",".join(map(str, chosen_layers(store, layers)))
        base, changes = make_grid(TrainConfig, {"layer": chosen, **given}, others or [], config)
        asked = points({**base, "store": store}, changes, out)
        names = [point.config.out.name for point in asked if point.config is not None]
        with SweepDisplay(names) as display:
            result = run(asked, out, apart=apart, report=_by_name(display))
        if IS_MAIN:
            write_sweep(result)
        return asdict(result)

    perform("sweep", work, as_json)


def _by_name(display: Callable[[Any], None]) -> Callable[[Any], None]:
    """Tell a display of runs by the names of their folders."""
    return lambda told: display(told._replace(run=Path(told.run).name))
