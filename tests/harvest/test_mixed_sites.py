"""Stores whose layers have different sites: gone on with, mended, and nothing else added."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from lorsa.errors import HarvestError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest, plan_harvest, stored_request
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.read.reader import ActivationStore
from small import digests
from tiny import make_model, make_tokenizer

N_CTX = 16
SITES = ["0.attn_in", "0.attn_out", "2.attn_in", "2.attn_out", "2.mlp_in", "2.mlp_out"]


@pytest.fixture
def config(tmp_path: Path, text_folder: Path) -> HarvestConfig:
    """Return the request of a store of attention that has the MLP of layer 2 besides."""
    make_model("llama-gqa").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = HarvestConfig(
        model=str(tmp_path / "model"),
        data=str(text_folder),
        store=tmp_path / "acts",
        layers="0,2",
        n_ctx=N_CTX,
        tokens=24 * N_CTX,
        dtype="float32",
        device="cpu",
    )
    harvest(config)
    harvest(dataclasses.replace(config, layers="2", sites="mlp"))
    return config


def _damage(config: HarvestConfig) -> dict[str, str]:
    """Delete a file of either layer; return the digests of before."""
    before = digests(config.store)
    for array in ("layers/0/attn_out", "layers/2/mlp_in"):
        next(p for p in (config.store / array / "c").rglob("*") if p.is_file()).unlink()
    assert len(digests(config.store)) == len(before) - 2
    return before


@pytest.mark.parametrize(("layers", "sites"), [("0,2", "attn"), ("2", "mlp")])
def test_any_command_that_it_was_made_by_writes_lost_files_again(
    layers: str, sites: str, config: HarvestConfig
) -> None:
    before = _damage(config)
    done = harvest(dataclasses.replace(config, layers=layers, sites=sites))
    assert done.sites == SITES
    assert digests(config.store) == before


def test_one_command_writes_again_what_a_repair_has_dropped(config: HarvestConfig) -> None:
    before = _damage(config)
    told = shlex.split(verify_store(config.store, repair=True)["next"])
    assert told[:2] == ["lorsa", "harvest"]
    assert "--layers" not in told
    assert "--sites" not in told
    with pytest.raises(HarvestError, match="finish it without --layers and --sites, then add"):
        harvest(dataclasses.replace(config, layers="2", sites="mlp"))
    rest = HarvestConfig(**stored_request(config.store), store=config.store)
    assert plan_harvest(rest).sites == SITES
    assert harvest(rest).sites == SITES
    assert digests(config.store) == before
    assert verify_store(config.store, full=True)["damages"] == []


def test_adding_that_was_stopped_goes_on_with_what_is_added(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings that are not given are those of the addition."""
    more = dataclasses.replace(config, layers="0", sites="resid")
    with monkeypatch.context() as patched:
        patched.setattr("lorsa.harvest.ways.write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            harvest(more)
    known = stored_request(config.store)
    assert (known["layers"], known["sites"]) == ("0", "resid")
    done = harvest(HarvestConfig(**known, store=config.store))
    assert done.sites == sorted([*SITES, "0.resid_in", "0.resid_mid", "0.resid_out"])


def test_what_is_stored_of_two_modules_needs_no_residual_stream(
    tmp_path: Path, text_folder: Path, config: HarvestConfig
) -> None:
    """With the settings of a store that derives, nothing is added to it."""
    derived = dataclasses.replace(config, store=tmp_path / "derived", outputs="derive")
    for sites in ("attn", "mlp"):
        harvest(dataclasses.replace(derived, sites=sites))
    known = stored_request(derived.store)
    assert known["sites"] == "attn,mlp"
    assert harvest(HarvestConfig(**known, store=derived.store)).tokens_per_second == 0
    assert "0.resid_in" not in map(str, ActivationStore.open(derived.store).sites)


def test_removed_sites_are_not_written_again_by_what_is_left(config: HarvestConfig) -> None:
    remove_sites(config.store, sites="2.attn")
    before = _damage(config)
    verify_store(config.store, repair=True)
    known = stored_request(config.store)
    assert (known["layers"], known["sites"]) == ("0", "attn")
    done = harvest(HarvestConfig(**known, store=config.store))
    assert done.sites == [site for site in SITES if not site.startswith("2.attn")]
    assert digests(config.store) == before
