"""lorsa train and sweep."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store.choices import DEFAULT_STORE
from . import completing
from .common import ConfigFile, Json, chosen_layers, perform
from .ending import IS_MAIN
from .following import following
from .options import FromConfig, Given
from .settings import Grid, make_grid, refused, settings_of

if TYPE_CHECKING:
    from ..train.config import TrainConfig
    from ..train.train import RunOutcome

NAMES = {"train_tokens": ("--train-tokens", "--tokens")}
SWEPT = (
    "kind", "site", "expansion", "n_features", "n_ov_heads", "n_qk_heads", "skip", "prefixes",
    "top_k", "select", "activation", "init", "train_tokens", "batch_tokens", "lr", "seed",
    "precision", "device",
)  # fmt: skip
"""Settings that are options of both; the others are for --config and --set."""
TRAINED = (
    "store", *SWEPT, "minutes", "micro_batch_tokens", "shard", "exact", "loss_mask", "tracker",
)  # fmt: skip
CONFIG = "train.config.TrainConfig"
NEW_STORE = {"store": DEFAULT_STORE}
"""Default of a command that makes something of a store, as that of a harvest."""

Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        "--layer",
        help="0-27, 3,7,12 or all.",
        show_default="all that have the sites",
        autocompletion=completing.layers,
    ),
]


def train(
    given: Annotated[Given, FromConfig(CONFIG, only=TRAINED, names=NAMES, defaults=NEW_STORE)],
    layer: Layers = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the runs, such as OUT/layer-12, OUT/12.mlp, OUT/12.resid_out."
        ),
    ] = Path("runs"),
    apart: Annotated[
        bool,
        typer.Option(
            "--apart/--together",
            help="With several processes and runs: each takes whole runs, or a share of every "
            "step.",
        ),
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Train a dictionary for every stored layer; no language model is needed.

    --kind says of which kind: lorsa, sae, transcoder, or all whose sites are stored. The same
    command goes on where an earlier one was stopped, and passes over finished runs.

    Example: lorsa train --store ./acts --layers 12 --top-k 32

    Example: lorsa train --store ./acts --kind transcoder --skip

    Example: lorsa train --store ./acts --minutes 30 --activation batchtopk

    Example: accelerate launch -m lorsa train --store ./acts --shard
    """

    def work() -> dict[str, Any]:
        configs = _planned(NEW_STORE | given, layer, out, config)
        outcomes = _train(configs, apart=apart)
        failed = [
            {"run": str(o.config.out), "layer": o.config.layer, "error": str(o.failure)}
            for o in outcomes
            if o.failure is not None
        ]
        results = [asdict(o.result) for o in outcomes if o.result is not None]
        follows = following("eval", *(run["run"] for run in results)) if results else None
        return {"runs": results, "failed": failed, "ok": not failed, "next": follows}

    perform("train", work, as_json)


def _planned(given: Given, layers: str | None, out: Path, file: Path | None) -> "list[TrainConfig]":
    """Return the runs that are asked for by options and a TOML file."""
    from ..store.facts import StoreFacts
    from ..train.config import TrainConfig
    from ..train.plan import plan_runs

    settings = settings_of(TrainConfig, file) | given
    store = StoreFacts.open(settings["store"])
    chosen = None if layers is None else chosen_layers(layers, store.layers, where=str(store.root))
    with refused(file):
        runs = plan_runs(settings, store, chosen, out)
        return [TrainConfig(**run) for run in runs]


def _train(configs: Sequence["TrainConfig"], *, apart: bool) -> "list[RunOutcome]":
    """Train runs and show how far they are; raise the failure of one that is alone."""
    from ..display.sweep import SweepDisplay
    from ..display.train import TrainDisplay
    from ..train.train import require_trainable, train_many

    for config in configs:  # what is wrong with the last is said before the first
        require_trainable(config)
    if len(configs) == 1:
        with TrainDisplay(configs[0].label) as one:
            outcomes = train_many(configs, report=lambda told: one(told.event))
        if outcomes[0].failure is not None:
            raise outcomes[0].failure
        return outcomes
    names = [config.out.name for config in configs]
    with SweepDisplay(names, label="train", comparable=_is_one_place(configs)) as display:
        return train_many(configs, apart=apart, report=_by_name(display))


def sweep(
    given: Annotated[
        Given,
        FromConfig(CONFIG, only=("store", *SWEPT), names=NAMES, many=True, defaults=NEW_STORE),
    ],
    layer: Layers = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the sweep: its runs, table and plot.")
    ] = Path("sweep"),
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
    """Train a dictionary for every combination of values, reading the store once for many.

    Values are joined by commas: --top-k 32,64,128. The same command goes on where an earlier one
    was stopped, and passes over finished runs; a run that fails does not stop the others.

    Example: lorsa sweep --store ./acts --layer 12 --top-k 32,64,128 --lr 1e-3,2e-3

    Example: lorsa sweep --store ./acts --layer 12 --kind transcoder --skip true,false --seed 0,1

    Example: lorsa sweep --store ./acts --layer 12 --set warmup_frac=0.05,0.1

    Example: lorsa sweep --store ./acts --layers all --config sweep.toml --out sweeps/first
    """

    def work() -> dict[str, Any]:
        from ..display.sweep import SweepDisplay
        from ..train.sweep import points, write_sweep
        from ..train.sweep import sweep as run

        store = given.pop("store", DEFAULT_STORE)
        base, changes = _swept(store, layer, given, others or [], config)
        asked = points({**base, "store": store}, changes, out)
        configs = [point.config for point in asked if point.config is not None]
        names = [config.out.name for config in configs]
        with SweepDisplay(names, comparable=_is_one_place(configs)) as display:
            result = run(asked, out, apart=apart, report=_by_name(display))
        if IS_MAIN:
            write_sweep(result)
        return asdict(result) | {"next": _measuring_best(result.rows)}

    perform("sweep", work, as_json)


def _swept(
    store: str, layers: str | None, given: Given, others: Sequence[str], file: Path | None
) -> Grid:
    """Return what a sweep is asked for; without a choice, of the layers that have the sites.

    Of `--kind all` the runs remain whose sites are stored, if there are any.
    """
    from ..store.facts import StoreFacts
    from ..train.config import TrainConfig
    from ..train.plan import has_sites, layers_with
    from ..train.recipe import ALL, KINDS

    facts = StoreFacts.open(store)
    takes_all = given.get("kind") == ALL
    if takes_all:
        given = given | {"kind": ",".join(KINDS)}
    if layers is None:
        every = make_grid(TrainConfig, given, others, file)
        chosen = layers_with(facts, [every.base | change for change in every.changes])
    else:
        chosen = chosen_layers(layers, facts.layers, where=store)
    numbers = {"layer": ",".join(map(str, chosen))}
    asked = make_grid(TrainConfig, numbers | given, others, file)
    there = [change for change in asked.changes if has_sites(facts, asked.base | change)]
    return asked._replace(changes=there) if takes_all and there else asked


def _measuring_best(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the command that measures the best run of each place, if any has an FVU."""
    from ..display.sweep import best_rows

    best = best_rows(rows)
    return following("eval", *(row["run"] for row in best)) if best else None


def _is_one_place(configs: Sequence["TrainConfig"]) -> bool:
    """Whether all runs read and write the same sites."""
    return len({config.ports for config in configs}) == 1


def _by_name(display: Callable[[Any], None]) -> Callable[[Any], None]:
    """Tell a display of runs by the names of their folders."""
    return lambda told: display(told._replace(run=Path(told.run).name))
