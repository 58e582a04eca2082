"""Plans: which dictionaries a command trains of a store, and settings that belong to a kind."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from lorsa.dictionaries.kinds import KINDS as CLASSES
from lorsa.errors import StoreError
from lorsa.sites import Site, parse_site_names
from lorsa.store.facts import StoreFacts
from lorsa.train.config import TrainConfig
from lorsa.train.plan import layers_with, plan_runs
from lorsa.train.recipe import DEFAULTS, INITS, KINDS, OWN


class _Facts:
    """Facts of a store that has some sites of some layers."""

    root = "acts"

    def __init__(self, **groups: str) -> None:
        names = {int(layer[1:]): parse_site_names(text) for layer, text in groups.items()}
        self.sites = [Site(layer, name) for layer, some in names.items() for name in some]
        self.layers = sorted(names)

    def has(self, site: Site) -> bool:
        return site in self.sites

    def require_sites(self, sites: Iterable[Site]) -> None:
        if lacking := sorted({site for site in sites if site not in self.sites}):
            raise StoreError(f"lacks {', '.join(map(str, lacking))}")

    def adding(self, sites: Iterable[Site], *, word: str) -> str:
        return f"add {word}: {', '.join(sorted(map(str, sites)))}"


def _facts(**groups: str) -> StoreFacts:
    return cast(StoreFacts, _Facts(**groups))


MIXED = _facts(L1="attn", L2="attn,mlp", L3="mlp,resid_out")


def _folders(layers: list[int] | None = None, store: StoreFacts = MIXED, **given: Any) -> list[str]:
    return [str(run["out"]) for run in plan_runs(given, store, layers, Path("runs"))]


def test_every_layer_that_has_the_sites_of_a_kind_is_trained() -> None:
    assert _folders() == ["runs/layer-1", "runs/layer-2"]
    assert _folders(kind="transcoder") == ["runs/2.mlp", "runs/3.mlp"]
    assert _folders(kind="sae") == ["runs/3.resid_out"]
    assert _folders(kind="sae", site="attn_out") == ["runs/1.attn_out", "runs/2.attn_out"]
    assert _folders(kind="sae", site="mlp") == [
        "runs/2.mlp_in", "runs/2.mlp_out", "runs/3.mlp_in", "runs/3.mlp_out"
    ]  # fmt: skip


def test_all_kinds_are_those_whose_sites_a_layer_has() -> None:
    assert _folders(kind="all") == [
        "runs/layer-1", "runs/layer-2", "runs/2.mlp", "runs/3.resid_out", "runs/3.mlp"
    ]  # fmt: skip
    assert _folders([1], kind="all") == ["runs/layer-1"]


def test_sites_that_are_asked_for_and_lacking_are_named() -> None:
    with pytest.raises(StoreError, match=r"lacks 1.mlp_in, 1.mlp_out"):
        _folders([1, 2], kind="transcoder")
    with pytest.raises(StoreError, match=r"lacks 1.resid_out"):
        _folders(kind="sae", store=_facts(L1="attn"))


def test_all_kinds_with_the_setting_of_one_whose_sites_are_lacking() -> None:
    """It was said that the setting is of another kind, though all kinds were asked for."""
    attention = _facts(L1="attn")
    for settings, lacking in (
        ({"site": "mlp_out"}, "1.mlp_out"),
        ({"skip": True}, "1.mlp_in, 1.mlp_out"),
        ({"prefixes": (0.5, 1)}, "1.mlp_in, 1.mlp_out, 1.resid_out"),
    ):
        with pytest.raises(StoreError, match=f"lacks {lacking}"):
            plan_runs({"kind": "all", **settings}, attention, None, Path("runs"))


def test_all_kinds_of_a_store_that_has_the_sites_of_none() -> None:
    """As one that derives from the residual stream can be; an SAE has to be told its site."""
    streams = _facts(L1="resid_in", L2="resid_in")
    with pytest.raises(StoreError) as raised:
        _folders([2], streams, kind="all")
    assert str(raised.value) == (
        "--kind all finds the sites of no kind in acts, which has layer 2 (resid_in): give --kind "
        "sae --site resid_in, or add them: 2.attn_in, 2.attn_out, 2.mlp_in, 2.mlp_out, 2.resid_out"
    )
    assert _folders([2], streams, kind="sae", site="resid_in") == ["runs/2.resid_in"]
    assert _folders(store=streams, kind="all", site="resid_in") == [
        "runs/1.resid_in", "runs/2.resid_in"
    ]  # fmt: skip


def test_a_setting_goes_to_the_kinds_that_have_it() -> None:
    runs = plan_runs({"kind": "all", "skip": True, "n_qk_heads": 8}, MIXED, [2], Path("runs"))
    assert [(run["kind"], run.get("skip"), run.get("n_qk_heads")) for run in runs] == [
        ("lorsa", None, 8), ("transcoder", True, None)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"^skip is a setting of kind transcoder, and only kind"):
        plan_runs({"kind": "lorsa", "skip": True}, MIXED, [1], Path("runs"))
    with pytest.raises(ValueError, match=r"^kind is 'sea'; allowed: lorsa, sae, transcoder or all"):
        plan_runs({"kind": "sea"}, MIXED, None, Path("runs"))


def test_a_sweep_takes_the_layers_that_have_the_sites_of_a_run() -> None:
    assert layers_with(MIXED, [{}]) == [1, 2]
    assert layers_with(MIXED, [{"kind": "sae"}, {"kind": "transcoder"}]) == [2, 3]
    assert layers_with(MIXED, [{"kind": "sae", "site": "resid_in"}]) == [1, 2, 3]
    assert layers_with(MIXED, [{"kind": "sea"}]) == [1, 2, 3]


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig(store="acts", layer=1, out=Path("run"), **changes)


def test_the_tables_of_kinds_name_kinds_and_settings() -> None:
    assert set(KINDS) == set(CLASSES) == set(DEFAULTS) == set(INITS)
    assert {kind for kinds in OWN.values() for kind in kinds} <= set(KINDS)
    for kind in KINDS:
        config = _config(kind=kind)
        assert {name: getattr(config, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]
        assert config.init in INITS[kind]
    assert set(OWN) <= set(_config().to_dict())


def test_the_page_has_the_defaults_of_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs/recipe.md").read_text("utf-8")
    head, *rows = re.findall(r"^\| (`?\w+`?) \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    told = {row[0].strip("`"): dict(zip(KINDS, row[1:], strict=True)) for row in rows}
    assert head == ("setting", *(f"`{kind}`" for kind in KINDS))
    asked = {name for some in DEFAULTS.values() for name in some} - {"site"}
    assert told == {n: {kind: str(DEFAULTS[kind][n]) for kind in KINDS} for n in asked}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sae", "skip": True}, "skip is a setting of kind transcoder, and this is of"),
        ({"prefixes": (0.5, 1)}, "prefixes is a setting of kind sae and transcoder, and this"),
        ({"kind": "transcoder", "site": "attn_out"}, "site is a setting of kind sae"),
        ({"kind": "transcoder", "n_qk_heads": 4}, "n_qk_heads is a setting of kind lorsa"),
        ({"kind": "sea"}, "kind is 'sea'; allowed: lorsa, sae, transcoder"),
        ({"kind": "sae", "init": "layer"}, "init is 'layer'; allowed: data"),
        ({"kind": "sae", "site": "resid_oot"}, "'resid_oot' is no site; near: resid_out"),
        ({"kind": "sae", "site": "resid"}, "site is 'resid'; one of attn_in"),
        ({"kind": "sae", "prefixes": (0.5, 0.5, 1)}, "prefixes are 0.5, 0.5, 1; allowed: shares"),
        ({"kind": "sae", "prefixes": (0.5, 0.75)}, "prefixes are 0.5, 0.75; allowed"),
        ({"kind": "sae", "prefixes": (0.0, 1.0)}, "prefixes are 0.0, 1.0; allowed"),
        ({"kind": "sae", "prefixes": (float("nan"), 1)}, "prefixes are nan, 1; allowed"),
        ({"kind": "sae", "prefixes": ("half", 1)}, "prefixes are half, 1; allowed"),
        ({"kind": "sae", "prefixes": ()}, "prefixes are none; allowed"),
        ({"kind": "sae", "n_features": 0}, "n_features is 0; allowed: 1 or more"),
    ],
)
def test_a_setting_of_another_kind_or_out_of_range_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + message):
        _config(**changes)


def test_what_decides_a_lorsas_weights_has_no_settings_of_other_kinds() -> None:
    """Runs of versions that knew Lorsas alone go on."""
    decisive = _config().decisive()
    assert decisive["kind"] == "lorsa"
    assert decisive.keys().isdisjoint({"site", "skip", "prefixes", "n_features"})
    assert _config(kind="sae").decisive()["site"] == "resid_out"
    assert _config(kind="transcoder").decisive()["skip"] is False
