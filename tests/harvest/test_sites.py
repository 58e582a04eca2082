"""Sites of a harvest: stored as plain hooks see them, derived from as few as give the others."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lorsa.errors import HarvestError, StoreError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest, plan_harvest, stored_request
from lorsa.language.blocks import find_blocks
from lorsa.language.capture import Capture
from lorsa.language.selfcheck import SelfCheck
from lorsa.language.stored import deriver
from lorsa.sites import SITE_NAMES, Ports, Site
from lorsa.store.care.remove import remove_sites
from lorsa.store.read.reader import ActivationStore
from tiny import GQA, SIZES, make_model, make_tokenizer
from unseal import change_json

N_CTX = 16
ALL = "attn,mlp,resid"


def _config(tmp_path: Path, text_folder: Path, model: Any, **settings: Any) -> HarvestConfig:
    if isinstance(model, str):
        model = make_model(model)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    asked = {"store": tmp_path / "acts", "layers": "0,2", "sites": ALL, "dtype": "float32"}
    return HarvestConfig(
        model=str(tmp_path / "model"),
        data=str(text_folder),
        n_ctx=N_CTX,
        tokens=24 * N_CTX,
        device="cpu",
        **{**asked, **settings},
    )


def _seen(config: HarvestConfig, store: ActivationStore) -> dict[Site, torch.Tensor]:
    """Return every site of a model on the tokens of a store."""
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model)
    blocks = find_blocks(model)
    spots = {Site(i, n): at for i, block in blocks.items() for n, at in block.spots.items()}
    with Capture(model.eval(), spots=spots) as capture:
        return capture.run(store.tokens(range(store.manifest.n_seq)))


def _close(found: torch.Tensor, exact: torch.Tensor, limit: float = 1e-4) -> bool:
    return bool((found - exact).norm() <= limit * exact.norm())


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "olmo2", "opt", "falcon", "qwen3-moe"])
def test_all_sites_are_stored_as_the_model_has_them(
    family: str, tmp_path: Path, text_folder: Path
) -> None:
    config = _config(tmp_path, text_folder, family, batch_size=24)
    harvest(config)
    store = ActivationStore.open(config.store)
    seen = _seen(config, store)
    wanted = [site for site in seen if site.layer in (0, 2)]
    assert store.sites == sorted(wanted, key=lambda site: site.place)
    for site in store.sites:
        values = store.values(site, range(store.manifest.n_seq))
        assert _close(values, seen[site], 1e-5)
        assert torch.allclose(
            store.norms(site, range(store.manifest.n_seq)), values.norm(dim=-1), rtol=1e-5
        )
    is_known = store.manifest.modules["2.mlp"]["geometry"] is not None
    assert is_known == (family != "qwen3-moe")


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "olmo2", "opt", "falcon", "gpt2"])
def test_all_sites_are_derived_from_one_array_a_layer(
    family: str, tmp_path: Path, text_folder: Path
) -> None:
    config = _config(tmp_path, text_folder, family, outputs="derive")
    harvest(config)
    store = ActivationStore.open(config.store)
    assert [site for site in store.sites if store.is_stored(site)] == [
        Site(0, "resid_in"),
        Site(2, "resid_in"),
    ]
    seen, derive = _seen(config, store), deriver(store, "cpu")
    assert set(store.sites) == {site for site in seen if site.layer in (0, 2)}
    for site in store.sites:
        assert _close(store.values(site, range(store.manifest.n_seq), derive), seen[site])


@pytest.mark.parametrize(
    ("sites", "stored"),
    [
        ("attn", {"attn_in"}),
        ("mlp", {"mlp_in"}),
        ("mlp_out", {"mlp_out"}),
        ("attn,mlp", {"resid_in"}),
        ("resid", {"resid_in"}),
        ("attn_out,mlp_out", {"resid_in"}),
    ],
)
def test_as_few_arrays_are_stored_as_give_the_others(
    sites: str, stored: set[str], tmp_path: Path, text_folder: Path
) -> None:
    config = _config(tmp_path, text_folder, "llama-gqa", outputs="derive", sites=sites, layers="1")
    plan = plan_harvest(config)
    assert plan.bytes_per_token == 32 * 4
    harvest(config)
    store = ActivationStore.open(config.store)
    assert plan.sites == [str(site) for site in store.sites]
    assert {site.name for site in store.sites if store.is_stored(site)} == stored
    seen, derive = _seen(config, store), deriver(store, "cpu")
    for site in store.sites:
        assert _close(store.values(site, range(store.manifest.n_seq), derive), seen[site])
    assert harvest(config).tokens_per_second == 0  # it is complete


@pytest.mark.parametrize("outputs", ["store", "derive"])
def test_sites_are_added_to_a_store_of_the_same_tokens(
    outputs: str, tmp_path: Path, text_folder: Path
) -> None:
    config = _config(tmp_path, text_folder, "llama-gqa", outputs=outputs, sites="attn")
    harvest(config)
    before = {
        p: p.read_bytes() for p in (config.store / "layers/2/attn_in").rglob("*") if p.is_file()
    }
    for sites in ("mlp", "resid"):
        harvest(dataclasses.replace(config, sites=sites))
    store = ActivationStore.open(config.store)
    assert set(store.sites) == {Site(i, n) for i in (0, 2) for n in SITE_NAMES}
    seen, derive = _seen(config, store), deriver(store, "cpu")
    for site in store.sites:
        assert _close(store.values(site, range(store.manifest.n_seq), derive), seen[site])
    assert before == {path: path.read_bytes() for path in before}
    if outputs == "derive":
        names = {site.name for site in store.sites if store.is_stored(site)}
        assert names == {"attn_in", "mlp_in", "resid_in"}


def test_settings_that_are_not_given_are_those_of_the_store(
    tmp_path: Path, text_folder: Path
) -> None:
    """Of a store whose layers have different sites, those that all of them have."""
    config = _config(tmp_path, text_folder, "llama-gqa", sites="attn")
    harvest(config)
    harvest(dataclasses.replace(config, layers="2", sites="mlp"))
    known = stored_request(config.store)
    assert (known["layers"], known["sites"]) == ("0,2", "attn")
    assert harvest(HarvestConfig(**known, store=config.store)).tokens_per_second == 0
    harvest(dataclasses.replace(config, layers="0", sites="mlp"))
    assert stored_request(config.store)["sites"] == "attn,mlp"
    remove_sites(config.store, sites="0.mlp,2.attn")
    known = stored_request(config.store)
    assert (known["layers"], known["sites"]) == ("0", "attn")
    assert harvest(HarvestConfig(**known, store=config.store)).sites[2:] == [
        "2.mlp_in",
        "2.mlp_out",
    ]


def test_a_parallel_block_has_no_middle(tmp_path: Path, text_folder: Path) -> None:
    config = _config(tmp_path, text_folder, "falcon", sites="resid")
    said: list[Any] = []
    harvest(config, report=said.append)
    assert any("resid_mid is left out" in str(line) for line in said)
    store = ActivationStore.open(config.store)
    assert {site.name for site in store.sites} == {"resid_in", "resid_out"}
    assert harvest(config).tokens_per_second == 0
    with pytest.raises(HarvestError, match=r"0\.resid_mid: the layer has none"):
        harvest(dataclasses.replace(config, sites="resid_mid"))
    named = dataclasses.replace(config, store=tmp_path / "other", sites="resid_mid,resid_in")
    with pytest.raises(HarvestError, match=r"0\.resid_mid: the layer has none: attention and MLP"):
        harvest(named)
    assert not named.store.exists()


@pytest.mark.parametrize(("family", "needs"), [("falcon", False), ("llama-gqa", True)])
def test_a_parallel_mlp_is_derived_without_the_attention(
    family: str, needs: bool, tmp_path: Path, text_folder: Path
) -> None:
    config = _config(
        tmp_path, text_folder, family, sites="resid_in,mlp", outputs="derive", layers="2"
    )
    said: list[Any] = []
    harvest(config, report=said.append)
    assert any(isinstance(event, SelfCheck) for event in said) == needs
    store = ActivationStore.open(config.store)
    assert ("2.attention" in store.manifest.modules) == needs
    assert [str(site) for site in store.sites if store.is_stored(site)] == ["2.resid_in"]
    seen = _seen(config, store)
    for sites in ("mlp", "attn,resid"):
        harvest(dataclasses.replace(config, sites=sites))
        store = ActivationStore.open(config.store)
        derive = deriver(store, "cpu")
        for site in store.sites:
            assert _close(store.values(site, range(store.manifest.n_seq), derive), seen[site])


def test_a_site_that_is_not_there_is_known_of_a_block_that_is_not_understood(
    tmp_path: Path, text_folder: Path
) -> None:
    """Or the harvest would look for it for ever."""
    model = make_model("falcon")
    model.transformer.h[2].mlp.dense_h_to_4h.weight.data[0, 0] = torch.nan
    config = _config(tmp_path, text_folder, model, sites="resid", keep_nonfinite=True)
    assert harvest(config).nonfinite_layers == [2]
    block = ActivationStore.open(config.store).manifest.modules["2.block"]
    assert block["geometry"] is None
    assert block["lacks"] == ["resid_mid"]
    assert harvest(config).tokens_per_second == 0
    with pytest.raises(HarvestError, match="nothing to harvest"):
        plan_harvest(config)


def test_a_stream_that_does_not_add_up_is_refused(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, text_folder, "llama-gqa", layers="1")
    monkeypatch.setattr("lorsa.language.block.Derivation._sum", lambda *_: torch.zeros(1))
    with pytest.raises(HarvestError, match=r"layer 1: its residual stream .*leave resid out of"):
        harvest(config)
    assert not config.store.exists()
    harvest(dataclasses.replace(config, sites="attn,mlp"))


def test_an_mlp_of_unknown_geometry_derives_nothing(tmp_path: Path, text_folder: Path) -> None:
    config = _config(tmp_path, text_folder, "mixtral", sites="mlp", outputs="derive")
    with pytest.raises(HarvestError, match=r"MLP is unknown \(it is a mixture of experts\)"):
        harvest(config)
    assert not config.store.exists()
    attention = dataclasses.replace(config, sites="attn")
    harvest(attention)
    with pytest.raises(HarvestError, match="this store derives, .* new --store, with --outputs st"):
        harvest(config)
    assert harvest(attention).sites == ["0.attn_in", "0.attn_out", "2.attn_in", "2.attn_out"]
    harvest(dataclasses.replace(config, store=tmp_path / "one", outputs="store"))
    without = dataclasses.replace(config, store=tmp_path / "two", sites="attn,mlp_in")
    harvest(without)  # mlp_in needs no MLP
    store = ActivationStore.open(without.store)
    seen, derive = _seen(config, store), deriver(store, "cpu")
    for site in store.sites:
        assert _close(store.values(site, range(store.manifest.n_seq), derive), seen[site])


def test_another_model_is_refused_by_any_of_its_weights(tmp_path: Path, text_folder: Path) -> None:
    for sites in ("mlp", "resid"):
        model = make_model("llama-gqa")
        config = _config(tmp_path, text_folder, model, store=tmp_path / sites, sites=sites)
        harvest(config)
        part = model.model.layers[0].mlp.up_proj if sites == "mlp" else model.model.layers[0]
        weight = part.weight if sites == "mlp" else part.post_attention_layernorm.weight
        weight.data[0] += 1
        model.save_pretrained(config.model)
        with pytest.raises(HarvestError, match="was made with another model: layer 0 has another"):
            harvest(dataclasses.replace(config, sites="attn"))


def test_a_wrong_site_is_named_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'mlp_inn' is no site; near: mlp_in"):
        HarvestConfig(model="m", sites="attn,mlp_inn")


def test_what_is_derived_does_not_hang_on_what_is_read_with_it(
    tmp_path: Path, text_folder: Path
) -> None:
    config = _config(tmp_path, text_folder, "llama-gqa", outputs="derive", dtype="int8")
    harvest(dataclasses.replace(config, sites="attn"))
    harvest(config)
    store = ActivationStore.open(config.store)
    x, mlp_in = Site(2, "attn_in"), Site(2, "mlp_in")
    assert store.is_stored(x)
    derive = deriver(store, "cpu")
    both = store.activations(Ports((x,), (mlp_in,)), range(4), derive)
    assert torch.equal(both.y, store.values(mlp_in, range(4), derive))


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("1.attention", {"geometry": None}),
        ("1.mlp", {"geometry": {"d_mlp": 3}}),
        ("1.block", {"geometry": {"before_mlp": 3}}),
    ],
)
def test_what_the_manifest_has_wrong_is_told_in_a_line(
    module: str, changes: dict[str, Any], tmp_path: Path, text_folder: Path
) -> None:
    config = _config(tmp_path, text_folder, "llama-gqa", outputs="derive", layers="1")
    harvest(config)
    file = config.store / "manifest.json"
    modules = json.loads(file.read_text())["modules"]
    modules[module] |= changes
    change_json(file, modules=modules)
    (config.store / "journal/plan.json").unlink()
    store = ActivationStore.open(config.store)
    with pytest.raises(StoreError, match=r"resid_out cannot be derived .*; harvest the layer"):
        store.values(Site(1, "resid_out"), range(2), deriver(store, "cpu"))


@pytest.mark.parametrize(
    ("module", "name"),
    [("1.attention", "W_Q"), ("1.attention", "W_O"), ("1.mlp", "W_up"), ("1.block", "before_mlp")],
)
def test_weights_of_other_shapes_are_told_in_a_line(
    module: str, name: str, tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stranger's store may have them: it ended in a trace."""
    config = _config(tmp_path, text_folder, "llama-gqa", outputs="derive", layers="1")
    harvest(config)
    weights = ActivationStore.weights

    def cut(store: ActivationStore, asked: str) -> dict[str, torch.Tensor]:
        found = weights(store, asked)
        return found | ({name: found[name][:-1]} if asked == module else {})

    monkeypatch.setattr(ActivationStore, "weights", cut)
    store = ActivationStore.open(config.store)
    with pytest.raises(StoreError, match=r"resid_out cannot be derived .*; harvest the layer") as e:
        store.values(Site(1, "resid_out"), range(2), deriver(store, "cpu"))
    assert "\n" not in str(e.value)
    assert name in str(e.value) or module in str(e.value)


def test_a_width_that_is_not_the_block_s_is_told_in_a_line(
    tmp_path: Path, text_folder: Path
) -> None:
    config = _config(tmp_path, text_folder, "llama-gqa", outputs="derive", layers="1")
    harvest(config)
    store = ActivationStore.open(config.store)
    half = {Site(1, "resid_in"): torch.zeros(1, N_CTX, 16)}
    with pytest.raises(StoreError, match=r"1\.resid_in is 16 wide, its block 32"):
        deriver(store, "cpu")(half, [Site(1, "mlp_in")])


def test_a_multiplier_is_kept_in_the_store(tmp_path: Path, text_folder: Path) -> None:
    config = transformers.GraniteConfig(**SIZES, **GQA, residual_multiplier=0.3)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    asked = _config(tmp_path, text_folder, model, outputs="derive")
    harvest(asked)
    store = ActivationStore.open(asked.store)
    assert store.manifest.modules["2.block"]["geometry"]["multiplier"] == 0.3
    seen, derive = _seen(asked, store), deriver(store, "cpu")
    for site in store.sites:
        assert _close(store.values(site, range(store.manifest.n_seq), derive), seen[site])
