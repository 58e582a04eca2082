"""One harvest: stopped, gone on with, added to, refused."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from lorsa.errors import HarvestError, StoreError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.events import Progress
from lorsa.harvest.harvest import harvest, plan_harvest, stored_request
from lorsa.harvest.plan import Estimate, Plan
from lorsa.language import selfcheck
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.selfcheck import SelfCheck, understand
from lorsa.language.stored import deriver
from lorsa.sites import Site, attention_ports
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import is_begun, is_complete
from lorsa.store.read.reader import ActivationStore
from small import digests
from tiny import make_model, make_tokenizer


@pytest.fixture
def config(harvest_config: HarvestConfig, tmp_path: Path) -> HarvestConfig:
    """The request of `store_folder`, for another folder."""
    return dataclasses.replace(harvest_config, store=tmp_path / "acts")


class Stop(Exception):  # noqa: N818
    """Ends a harvest from outside."""


def _stop_after(n_tokens: int) -> Any:
    def report(event: Any) -> None:
        if isinstance(event, Progress) and event.tokens >= n_tokens:
            raise Stop

    return report


def test_what_happens_is_told_in_order(config: HarvestConfig) -> None:
    events: list[Any] = []
    result = harvest(config, report=events.append)
    kinds = [type(event) for event in events if not isinstance(event, str)]
    assert kinds[:3] == [Plan, SelfCheck, Estimate]
    assert set(kinds[3:]) == {Progress}
    assert events[-1].tokens == events[-1].n_tokens == result.n_tokens
    files = [p for p in config.store.rglob("*") if p.is_file() and "c" in p.parts]
    plan = next(event for event in events if isinstance(event, Plan))
    assert 0.9 < sum(p.stat().st_size for p in files) / plan.total_bytes < 1.1


def test_a_stopped_harvest_goes_on_to_the_same_bytes(
    config: HarvestConfig, store_folder: Path
) -> None:
    with pytest.raises(Stop):
        harvest(config, report=_stop_after(60 * config.n_ctx))
    assert is_begun(config.store)
    assert not is_complete(config.store)
    events: list[Any] = []
    result = harvest(dataclasses.replace(config, layers="2,1"), report=events.append)
    first = next(event for event in events if isinstance(event, Progress))
    assert 0 < first.tokens < first.n_tokens
    assert result.layers == [1, 2]
    assert digests(config.store) == digests(store_folder)


def test_a_stopped_harvest_refuses_other_settings(config: HarvestConfig) -> None:
    with pytest.raises(Stop):
        harvest(config, report=_stop_after(1))
    with pytest.raises(
        HarvestError, match=r"is unfinished with layers 1-2, and what is asked for is layer 1:"
    ):
        harvest(dataclasses.replace(config, layers="1"))
    with pytest.raises(HarvestError, match="dtype was 'float32', is 'float16'"):
        harvest(dataclasses.replace(config, dtype="float16"))


def test_a_stopped_harvest_refuses_another_model(
    config: HarvestConfig, model_folder: Path, tmp_path: Path
) -> None:
    """The same folder, with other weights in it since."""
    shutil.copytree(model_folder, tmp_path / "model")
    config = dataclasses.replace(config, model=str(tmp_path / "model"))
    with pytest.raises(Stop):
        harvest(config, report=_stop_after(1))
    make_model("llama-gqa", seed=9).save_pretrained(tmp_path / "model")
    with pytest.raises(HarvestError, match="was made with another model: layer 1 has another W_"):
        harvest(config)


def test_a_late_nan_leaves_no_shard_of_it(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sequences are fine, as the self-check sees them; later ones are not.

    The message's remedy, --keep-nonfinite, was refused as another harvest.
    """
    of_model = Capture.see
    calls = iter(range(10**6))

    def poisoned(self: Capture, tokens: torch.Tensor) -> Any:
        found = of_model(self, tokens)
        if next(calls) > 5:
            site = Site(2, "attn_out")
            found.sites[site] = torch.full_like(found.sites[site], float("nan"))
        return found

    monkeypatch.setattr(Capture, "see", poisoned)
    with pytest.raises(StoreError, match="the same command with --keep-nonfinite"):
        harvest(config)
    with pytest.raises(StoreError, match="unfinished"):
        ActivationStore.open(config.store)
    assert not list(config.store.rglob("*.partial"))
    keeping = dataclasses.replace(config, keep_nonfinite=True)
    assert harvest(keeping).nonfinite_layers == [2]
    assert harvest(config).tokens_per_second == 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_derived_y_is_the_models(config: HarvestConfig, store_folder: Path, dtype: str) -> None:
    said: list[Any] = []
    smaller = dataclasses.replace(config, outputs="derive", dtype=dtype)
    result = harvest(smaller, report=said.append)
    store, whole = ActivationStore.open(config.store), ActivationStore.open(store_folder)
    assert [site.name for site in store.sites if not store.is_stored(site)] == ["attn_out"] * 2
    derive = deriver(store, "cpu")
    for layer in result.layers:
        x, y = whole.activations(attention_ports(layer), whole.held_out_seqs)
        found = store.activations(attention_ports(layer), whole.held_out_seqs, derive)
        for mine, plain in ((found.x, x), (found.y, y)):
            assert (mine - plain).norm() / plain.norm() < (1e-5 if dtype == "float32" else 0.02)
        y_site = Site(layer, "attn_out")
        assert store.mean_norm(y_site) == pytest.approx(whole.mean_norm(y_site), rel=1e-5)
    plan = next(event for event in said if isinstance(event, Plan))
    width = store.width(Site(1, "attn_in"))
    assert plan.bytes_per_token == 2 * width * (4 if dtype == "float32" else 1) + (
        8 if dtype == "int8" else 0
    )
    assert any("int8: the largest scale" in str(event) for event in said) == (dtype == "int8")
    again: list[Any] = []
    harvest(smaller, report=again.append)
    assert any("already complete" in str(event) for event in again)


def test_what_cannot_be_derived_is_refused(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'derive', which needs the self-check"):
        dataclasses.replace(config, outputs="derive", selfcheck=False)
    monkeypatch.setattr(selfcheck, "LIMIT", -1.0)
    with pytest.raises(HarvestError, match="attention recomputed from what was read of the model"):
        harvest(dataclasses.replace(config, outputs="derive"))
    assert not is_begun(config.store)


def test_a_stopped_int8_harvest_goes_on_to_the_same_bytes(
    config: HarvestConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'lz4', which saves nothing on int8"):
        dataclasses.replace(config, dtype="int8", compression="lz4")
    config = dataclasses.replace(config, dtype="int8", compression="zstd")
    harvest(config)
    stopped = dataclasses.replace(config, store=tmp_path / "stopped")
    with pytest.raises(Stop):
        harvest(stopped, report=_stop_after(60 * config.n_ctx))
    harvest(dataclasses.replace(stopped, buffer_gb=0.5))
    assert digests(stopped.store) == digests(config.store)


def test_a_complete_store_without_a_plan_is_repaired_first(
    config: HarvestConfig, store_folder: Path
) -> None:
    """The message was to run the command that printed it."""
    shutil.copytree(store_folder, config.store)
    (config.store / "journal/plan.json").unlink()
    (config.store / "layers/1/attn_in/c/1/0/0").unlink()
    with pytest.raises(StoreError, match=f"so first: lorsa store verify {config.store} --repair"):
        harvest(config)
    assert verify_store(config.store, repair=True)["repaired"]
    harvest(config)
    assert digests(config.store) == digests(store_folder)


def test_layers_added_later_are_those_of_one_harvest(config: HarvestConfig, tmp_path: Path) -> None:
    """Of the same tokens; the layers that are there are not touched."""
    whole = dataclasses.replace(config, layers="all", store=tmp_path / "whole")
    harvest(whole)
    harvest(dataclasses.replace(config, layers="1"))
    before = digests(config.store)
    said: list[Any] = []
    result = harvest(dataclasses.replace(config, layers="0,1"), report=said.append)
    assert result.layers == [0, 1]
    assert any("adding layer 0 to" in str(event) for event in said)
    plan = next(event for event in said if isinstance(event, Plan))
    assert list(plan.layers) == [0]
    assert harvest(dataclasses.replace(config, layers="2")).layers == [0, 1, 2]
    after = digests(config.store)
    assert after.items() > before.items()
    assert {k: v for k, v in after.items() if k.startswith("layers")} == {
        k: v for k, v in digests(whole.store).items() if k.startswith("layers")
    }
    assert verify_store(config.store, full=True)["damages"] == []


def test_adding_layers_that_was_stopped_goes_on(config: HarvestConfig, tmp_path: Path) -> None:
    """The layers that were there can be read meanwhile."""
    harvest(dataclasses.replace(config, layers="1"))
    more = dataclasses.replace(config, layers="0,1")
    with pytest.raises(Stop):
        harvest(more, report=_stop_after(60 * config.n_ctx))
    assert ActivationStore.open(config.store).layers == [1]
    assert harvest(dataclasses.replace(config, layers="1")).tokens_per_second == 0
    with pytest.raises(
        HarvestError, match="unfinished with layers 0-1, .* asked for is layers 1-2"
    ):
        harvest(dataclasses.replace(config, layers="2"))
    events: list[Any] = []
    assert harvest(more, report=events.append).layers == [0, 1]
    first = next(event for event in events if isinstance(event, Progress))
    assert 0 < first.tokens < first.n_tokens
    harvest(dataclasses.replace(config, layers="0,1", store=tmp_path / "whole"))
    assert digests(config.store) == digests(tmp_path / "whole")


def test_layers_of_another_model_are_not_added(
    config: HarvestConfig, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    config = dataclasses.replace(config, model=str(tmp_path / "model"), layers="1")
    harvest(config)
    make_model("llama-gqa", seed=9).save_pretrained(tmp_path / "model")
    with pytest.raises(HarvestError, match="was made with another model: layer 1 has another W_"):
        harvest(dataclasses.replace(config, layers="0,1"))
    assert ActivationStore.open(config.store).layers == [1]


def test_a_request_to_stop_waits_for_the_shard(config: HarvestConfig, store_folder: Path) -> None:
    """Ctrl-C in the middle of a shard: it is committed, and the same call goes on."""
    events: list[Any] = []

    def interrupt(event: Any) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.tokens == 3 * config.n_ctx:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        harvest(dataclasses.replace(config, batch_size=1), report=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert any("stopping when this shard is written" in str(event) for event in events)
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert last.tokens == 4 * config.n_ctx  # a shard of four sequences
    harvest(dataclasses.replace(config, batch_size=1))
    assert verify_store(config.store, full=True)["damages"] == []


def test_what_a_harvest_would_take_is_told_without_a_store(config: HarvestConfig) -> None:
    said: list[Any] = []
    plan = plan_harvest(config, report=said.append)
    assert plan.n_tokens == 130 * config.n_ctx
    assert plan.bytes_per_token == 2 * 2 * 32 * 4
    assert plan.layers == {1: "model.layers.1.self_attn", 2: "model.layers.2.self_attn"}
    assert plan.estimate is not None
    assert plan.estimate.seconds > 0
    assert plan.first_tokens
    assert not config.store.exists()
    harvest(config)
    with pytest.raises(HarvestError, match="has layers 1-2: nothing to harvest"):
        plan_harvest(config)
    before = digests(config.store)
    more = plan_harvest(dataclasses.replace(config, layers="0-2"))
    assert (list(more.layers), more.bytes_per_token) == ([0], 2 * 32 * 4)
    assert more.n_tokens == plan.n_tokens
    assert digests(config.store) == before
    with pytest.raises(HarvestError, match="seed was 0, is 7"):
        plan_harvest(dataclasses.replace(config, layers="0-2", seed=7))


def test_a_corpus_that_is_passed_over_is_a_warning_in_the_plan(
    config: HarvestConfig, tmp_path: Path
) -> None:
    """Documents of a file with a bad name were a traceback, and of links there was no word."""
    assert plan_harvest(config).warning == ""
    shutil.copytree(config.data, tmp_path / "data")
    first, *_others = sorted((tmp_path / "data").iterdir())
    first.rename(first.with_name("caf\udce9.txt"))
    for i in range(3):
        (tmp_path / f"data/{i}.jsonl").symlink_to("/nowhere/annex/key")
    changed = dataclasses.replace(config, data=str(tmp_path / "data"))
    assert plan_harvest(changed).warning == "passed over: 3 of 15 files and folders"
    harvest(changed)
    store = ActivationStore.open(config.store)
    assert r"caf\udce9.txt" in store.document_names()
    assert store.manifest.corpus["counts"] == {"dangling_links": 3}


def test_what_float16_does_not_hold_is_refused_before_anything_is_made(
    config: HarvestConfig, tmp_path: Path
) -> None:
    """It was found in the first shard, and left a store that could only be deleted."""
    model = make_model("llama-gqa")
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(1e5)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    large = dataclasses.replace(config, model=str(tmp_path / "model"), dtype="float16")
    with pytest.raises(HarvestError, match=r"1.attn_out reaches .*--dtype bfloat16"):
        harvest(large)
    assert not config.store.exists()
    harvest(dataclasses.replace(large, dtype="bfloat16"))


def test_a_config_alone_is_enough_for_a_plan(tmp_path: Path) -> None:
    """Qwen2-7B, of which nothing but config.json is there."""
    (tmp_path / "model").mkdir()
    shape = transformers.Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
    )
    (tmp_path / "model/config.json").write_text(json.dumps(shape.to_dict()))
    config = HarvestConfig(model=str(tmp_path / "model"), store=tmp_path / "acts", layers="0-27")
    plan = plan_harvest(dataclasses.replace(config, tokens=2048))
    assert plan.bytes_per_token == 401_408
    assert len(plan.layers) == 28
    assert (plan.first_tokens, plan.estimate) == ("", None)
    with pytest.raises(HarvestError, match=r"28 layers take .* TB; .* are free; what fits: "):
        plan_harvest(dataclasses.replace(config, tokens=10**9))


def test_the_settings_of_a_store_are_known(config: HarvestConfig) -> None:
    assert stored_request(config.store) == {}
    harvest(config)
    known = stored_request(config.store)
    assert known["layers"] == "1-2"
    assert {"n_ctx": 32, "dtype": "float32", "tokens": config.tokens}.items() <= known.items()
    again = HarvestConfig(**{**known, "store": config.store})
    assert harvest(again).tokens_per_second == 0


def test_a_model_in_the_hands_of_accelerate_is_captured(harvest_config: HarvestConfig) -> None:
    """As one that is split over several GPUs is: every module's forward is wrapped."""
    model = make_model("llama-gqa")
    tokens = torch.randint(0, 400, (2, 16))
    with Capture(model, attention_sites(model, [0, 2])) as capture:
        plain = capture.calls(tokens)
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    parts |= {f"model.layers.{i}": "cpu" for i in range(3)} | {"lm_head": "cpu"}
    dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    sites = attention_sites(model, [0, 2])
    with Capture(model, sites) as capture:
        calls = capture.calls(tokens)
    for layer, call in plain.items():
        assert torch.equal(calls[layer].x, call.x)
        assert torch.equal(calls[layer].y, call.y)
    for site in sites:
        assert understand(model, site, calls[site.layer]).check.passed


def test_what_was_passed_over_is_said_and_kept(config: HarvestConfig, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/good.txt").write_text("the dog sleeps on and on. " * 100)
    (tmp_path / "text/binary.txt").write_bytes(b"a\0b")
    said: list[Any] = []
    other = dataclasses.replace(config, data=str(tmp_path / "text"), tokens=None)
    harvest(other, report=said.append)
    assert "passed over: 1 file that is no text (binary.txt)" in said
    corpus = ActivationStore.open(other.store).manifest.corpus
    assert corpus["counts"] == {"no_text_files": 1}
    assert corpus["packing"] == "pack"


def test_token_ids_need_no_tokenizer(
    config: HarvestConfig, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    rows = [{"ids": [i + j for j in range(40 + i)]} for i in range(20)]
    lines = [json.dumps(row) for row in [*rows, {"ids": [400]}]]
    (tmp_path / "ids.jsonl").write_text("\n".join(lines))
    said: list[Any] = []
    other = dataclasses.replace(
        config,
        model=str(tmp_path / "model"),
        data=str(tmp_path / "ids.jsonl"),
        tokens_column="ids",
        packing="no-pack",
        tokens=None,
    )
    harvest(other, report=said.append)
    store = ActivationStore.open(other.store)
    tokens = store.tokens(range(store.manifest.n_seq))
    assert sorted(tokens.tolist()) == [row["ids"][: config.n_ctx] for row in rows]
    assert store.manifest.corpus["counts"] == {"cut_documents": 20, "foreign_documents": 1}
    assert store.manifest.tokenizer["vocabulary_sha256"] is None
    plan = next(event for event in said if isinstance(event, Plan))
    assert plan.first_tokens.startswith("token ids [")
    with pytest.raises(HarvestError, match="tokenizer"):
        harvest(dataclasses.replace(other, store=tmp_path / "b", tokens_column=None))
    assert not (tmp_path / "b").exists()
