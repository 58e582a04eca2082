"""lorsa harvest."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..sites import spell_site_names
from ..store.layers import spell_layers
from .common import ConfigFile, Json, perform
from .ending import IS_MAIN
from .following import following
from .options import FromConfig, Given
from .settings import make_config


def harvest(
    given: Annotated[Given, FromConfig("harvest.config.HarvestConfig")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would write and how long it takes.")
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Run a language model once and store activations, by default of its attention layers.

    The same command goes on where an earlier one was stopped; other --layers and --sites are added
    to a finished store, of the same tokens. What is not given is as the store has it.

    Example: lorsa harvest --model smollm2-135m --layers 12 --n-ctx 256 --tokens 400000

    Example: lorsa harvest --model qwen2-7b --layers 0-27 --dtype int8 --budget 500GB --dry-run

    Example: lorsa harvest --model qwen2-7b --layers 12 --sites attn,mlp,resid --outputs derive

    Example: lorsa harvest --model ./my-model --data ./texts --store s3://bucket/acts
    """

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
            if dry_run:
                return asdict(plan_harvest(settings, report=report))
            harvested = asdict(run(settings, report=report))
            return harvested | {"next": next_of_harvest(harvested)}

    perform("harvest --dry-run" if dry_run else "harvest", work, as_json)


def next_of_harvest(harvested: dict[str, Any]) -> str | None:
    """Return the command that trains on the layers of a store that can be trained on."""
    bad = harvested["nonfinite_layers"]
    good = [layer for layer in harvested["layers"] if layer not in bad]
    if not good:
        return None
    words = ["train", "--store", harvested["store"]]
    words += _kind_of({site.partition(".")[2] for site in harvested["sites"]})
    return following(*words, *(["--layers", spell_layers(good)] if bad else []))


def _kind_of(names: set[str]) -> list[str]:
    """Return the options with which `lorsa train` trains from sites of such names."""
    enough = ({"attn_in", "attn_out"}, {"mlp_in", "mlp_out"}, {"resid_out"})
    if names == enough[0]:
        return []
    if any(some <= names for some in enough):
        return ["--kind", "all"]
    return ["--kind", "sae", "--site", spell_site_names(names)]
