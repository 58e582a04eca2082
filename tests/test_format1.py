"""Stores of format 1, which knew layers, still open, train, go on, and take other sites."""

import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa import (
    ActivationStore,
    EvalConfig,
    HarvestConfig,
    TrainConfig,
    evaluate_lorsa,
    harvest_activations,
    train_lorsa,
    verify_store,
)
from lorsa.sites import Site, attention_ports
from lorsa.store.care.merge import merge_stores
from lorsa.store.care.remove import remove_sites
from lorsa.store.layered import pair_facts
from lorsa.store.manifest import MANIFEST, PLAN, read_manifest
from lorsa.store.write.writer import StoreWriter
from small import digests

BEFORE = Path(__file__).parent / "before"
RECORDED = json.loads((BEFORE / "format1.json").read_text("utf-8"))
PLACE = "@BEFORE@"
N_CTX, N_STEPS = 12, 24
OTHER_CPU = 1e-4
"""Relative: sums are added up in another order."""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all was made in, not to be changed."""
    folder = tmp_path_factory.mktemp("format1")
    for name in ("model.tar.xz", "format1.tar.xz"):
        with tarfile.open(BEFORE / name) as file:
            file.extractall(folder, filter="data")
    return folder


@pytest.fixture
def root(before: Path, tmp_path: Path) -> Path:
    """A copy of the finished store in bfloat16."""
    return Path(shutil.copytree(before / "format1/bfloat16", tmp_path / "acts"))


def _version(path: Path) -> int:
    found: int = json.loads(path.read_text("utf-8"))["format_version"]
    return found


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", RECORDED["stores"])
def test_a_store_opens_and_holds_what_it_held(before: Path, name: str) -> None:
    store = ActivationStore.open(before / "format1" / name)
    assert verify_store(store.root, full=True)["ok"]
    seqs = range(store.manifest.n_seq)
    for layer, known in RECORDED["stores"][name].items():
        x, y = attention_ports(int(layer)).sites
        assert _sha256(store.values(x, seqs).float()) == known["x_sha256"]
        if "y_sha256" in known:
            assert _sha256(store.values(y, seqs).float()) == known["y_sha256"]
        assert [_sha256(store.norms(site, seqs)) for site in (x, y)] == known["norms_sha256"]
        assert [store.mean_norm(site) for site in (x, y)] == known["mean_norms"]
    text = (store.root / MANIFEST).read_text("utf-8")
    assert read_manifest(store.root / MANIFEST).to_json() == text


@pytest.mark.parametrize(
    ("name", "layers"), [("half", "0,1"), ("half-derive", "1"), ("adding", "0,1")]
)
def test_a_store_that_was_begun_goes_on_as_format_1(
    before: Path, tmp_path: Path, name: str, layers: str
) -> None:
    """Files that were there stay, and it ends as the same harvest did that nothing stopped."""
    root = Path(shutil.copytree(before / "format1" / name, tmp_path / name))
    for path in (root / PLAN, root / MANIFEST):
        if path.exists():
            _place(path, before)
    kept = digests(root)
    config = _harvest(root, layers)
    harvest_activations(config)
    assert verify_store(root, full=True)["ok"]
    assert _version(root / MANIFEST) == _version(root / PLAN) == 1
    found, whole = digests(root), digests(before / "format1" / f"whole-{name}")
    kept = {path: digest for path, digest in kept.items() if not path.endswith(".partial")}
    assert found.keys() == whole.keys() >= kept.keys()
    assert {path: found[path] for path in kept} == kept
    mine, theirs = (
        ActivationStore.open(root),
        ActivationStore.open(before / f"format1/whole-{name}"),
    )
    assert mine.sites == theirs.sites
    for site in mine.sites:  # another CPU rounds otherwise
        norms = [store.norms(site, range(mine.manifest.n_seq)) for store in (mine, theirs)]
        assert torch.allclose(*norms, rtol=0.02)


def _place(path: Path, before: Path) -> None:
    """Write a manifest anew, with the folder that it was unpacked into."""
    manifest = read_manifest(path)
    request = json.loads(json.dumps(manifest.request).replace(PLACE, str(before)))
    path.write_text(replace(manifest, request=request).to_json())


def _harvest(root: Path, layers: str) -> HarvestConfig:
    request = read_manifest(root / PLAN).request
    return HarvestConfig(**request | {"layers": layers, "store": root, "device": "cpu"})


def test_what_is_written_again_is_what_it_was(root: Path, before: Path) -> None:
    """A shard of one array takes the pair with it; norms of both lie in one array as before."""
    whole, facts = ActivationStore.open(before / "format1/bfloat16"), (root / MANIFEST).read_bytes()
    (root / "layers/2/attn_in/c/3/0/0").unlink()
    with StoreWriter.resume(root) as writer:
        assert writer.sites_to_write == list(attention_ports(2).sites)
        assert writer.missing_shards() == [3]
        rows = writer.manifest.shard_rows(3)
        with writer.shard(3) as session:
            session.append({site: whole.values(site, rows) for site in writer.sites_to_write})
        writer.finish()
    found, known = digests(root), digests(whole.root)
    norms = "layers/2/norms/c/3/0/0"  # another CPU adds up otherwise
    assert {**found, norms: ""} == {**known, norms: ""}
    assert (root / MANIFEST).read_bytes() == facts
    for site in whole.sites:
        assert torch.allclose(ActivationStore.open(root).norms(site, rows), whole.norms(site, rows))


def test_other_sites_make_it_format_2_and_their_removal_format_1_again(root: Path) -> None:
    """No array that was there is touched; norms say where they lie."""
    facts, old = (root / MANIFEST).read_bytes(), digests(root)
    store = ActivationStore.open(root)
    new = pair_facts(0, 16, "store") | {
        Site(1, "mlp_in"): pair_facts(1, 16, "store")[Site(1, "attn_in")]
    }
    modules = {"0.attention": {"weights": ["W_Q"]}, "1.mlp": {"weights": ["W_in"]}}
    weights = {"0.attention": {"W_Q": torch.ones(2)}, "1.mlp": {"W_in": torch.ones(3)}}
    x = store.values(Site(1, "attn_in"), range(store.manifest.n_seq))
    with StoreWriter.add_sites(root, new, modules, modules=weights) as writer:
        assert set(writer.sites_to_write) == set(new)
        for shard in writer.missing_shards():
            rows = writer.manifest.shard_rows(shard)
            with writer.shard(shard) as session:
                session.append(dict.fromkeys(new, 2 * x[rows.start : rows.stop]))
        writer.finish()
    assert _version(root / MANIFEST) == 2
    assert digests(root).items() > old.items()
    assert verify_store(root, full=True)["ok"]
    after = ActivationStore.open(root)
    for site in store.sites:
        assert torch.equal(after.norms(site, [0, 5]), store.norms(site, [0, 5]))
        assert after.mean_norm(site) == store.mean_norm(site)
    for site in new:
        assert torch.equal(after.norms(site, [0, 5]), 2 * store.norms(Site(1, "attn_in"), [0, 5]))
    assert after.weights("1.mlp")["W_in"].tolist() == [1, 1, 1]
    remove_sites(root, "0")
    remove_sites(root, sites="1.mlp_in")
    assert (root / MANIFEST).read_bytes() == facts
    assert digests(root) == old
    assert verify_store(root, full=True)["ok"]
    assert verify_store(root)["leftovers"] == []


def test_one_of_a_pair_can_be_removed_and_harvested_again(root: Path, before: Path) -> None:
    x, y = attention_ports(1).sites
    remove_sites(root, sites="1.attn_out")
    store = ActivationStore.open(root)
    assert (store.has(x), store.has(y), _version(root / MANIFEST)) == (True, False, 2)
    assert not (root / "layers/1/attn_out").exists()
    assert verify_store(root, full=True)["ok"]
    whole = ActivationStore.open(before / "format1/bfloat16")
    assert torch.equal(store.norms(x, range(43)), whole.norms(x, range(43)))
    (root / "layers/1/norms/c/3/0/0").unlink()
    for path in (root / PLAN, root / MANIFEST):
        _place(path, before)
    verify_store(root, repair=True)
    config = _harvest(root, "1,2")
    harvest_activations(config)
    store = ActivationStore.open(root)
    assert store.sites == whole.sites
    assert verify_store(root, full=True)["ok"]
    for site in (x, y):
        assert torch.allclose(store.norms(site, range(43)), whole.norms(site, range(43)), rtol=0.02)
    assert (root / "layers/1/attn_out_norm").exists()


def test_it_merges_with_a_store_of_format_2(root: Path, tmp_path: Path) -> None:
    """The merged store has an array of norms for each site."""
    whole = ActivationStore.open(root)
    manifest = replace(
        whole.manifest,
        uuid="other",
        checksums={},
        sites=pair_facts(1, 16, "store") | pair_facts(2, 16, "store"),
    )
    seqs = range(43)
    with StoreWriter.create(
        tmp_path / "more",
        manifest,
        tokens=whole.tokens(seqs) + 1,
        documents=whole.documents(seqs),
        document_names=whole.document_names(),
        modules={module: whole.weights(module) for module in manifest.modules},
    ) as writer:
        for shard in writer.missing_shards():
            rows = manifest.shard_rows(shard)
            with writer.shard(shard) as session:
                session.append({site: whole.values(site, rows) for site in whole.sites})
        writer.finish()
    merge_stores([root, tmp_path / "more"], tmp_path / "both")
    merge_stores([tmp_path / "more", root], tmp_path / "other-way")
    for name in ("both", "other-way"):
        store = ActivationStore.open(tmp_path / name)
        assert verify_store(store.root, full=True)["ok"]
        assert _version(store.root / MANIFEST) == 2
        for site in store.sites:
            assert store.mean_norm(site) == pytest.approx(whole.mean_norm(site), rel=0.1)
            found = store.norms(site, range(86)).flatten().sort().values[::2]
            assert torch.allclose(found, whole.norms(site, seqs).flatten().sort().values)


@pytest.mark.parametrize("name", RECORDED["runs"])
def test_runs_of_it_measure_the_same_and_go_on(before: Path, tmp_path: Path, name: str) -> None:
    store, known = before / "format1" / name, RECORDED["runs"][name]
    run = shutil.copytree(before / "format1/runs" / name, tmp_path / "run")
    found = evaluate_lorsa(EvalConfig(run=Path(run), store=store, device="cpu"))
    assert found.fvu == pytest.approx(known["eval"], rel=OTHER_CPU)
    stopped = Path(shutil.copytree(before / "format1/stopped" / name, tmp_path / "stopped"))
    told: list[Any] = []
    result = train_lorsa(_train(store, stopped), report=told.append)
    assert any("step-000000018" in str(event) for event in told)
    assert result.fvu == pytest.approx(known["fvu"], rel=OTHER_CPU)


def _train(store: Path, run: Path) -> TrainConfig:
    asked = json.loads((run / "run.json").read_text("utf-8"))["config"]
    return TrainConfig(**asked | {"store": store, "out": run})
