"""Stores of any sites: read by ports, added to, removed from, verified, merged, killed."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.errors import BegunError, StoreError, UsageError
from lorsa.sites import Ports, Site, attention_ports, ports_between
from lorsa.store.care.info import store_info
from lorsa.store.care.merge import merge_stores
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import sites_being_added
from lorsa.store.manifest import MANIFEST, Manifest, read_manifest
from lorsa.store.read.loader import batches, held_out_batches
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.sampler import Sampler
from lorsa.store.site_facts import Derivation, SiteFacts
from lorsa.store.spelling import spell_sites
from lorsa.store.write.writer import StoreWriter
from power import PowerCutError, power_cut
from small import (
    N_SEQ,
    add_sites,
    create,
    digests,
    fill,
    make_manifest,
    mlp,
    tokens,
    values,
    values_of,
    weights_of,
)

MakeStore = Callable[..., Path]
MLP_IN, MLP_OUT = Site(3, "mlp_in"), Site(3, "mlp_out")
RESID = Site(3, "resid_out")
MLP = {"sites": mlp().sites, "modules": mlp().modules}
"""The sites of a layer's MLP, and what a manifest says of it"""


def mixed(**changes: Any) -> Manifest:
    """Return the facts of a store of attention, an MLP, and a derived site of another width."""
    attention = make_manifest()
    derived = SiteFacts(7, Derivation((MLP_IN, MLP_OUT), "3.block"))
    return make_manifest(
        sites=attention.sites | MLP["sites"] | {RESID: derived},
        modules=attention.modules | MLP["modules"] | {"3.block": {"weights": ["norm"]}},
        **changes,
    )


def derive(stored: Mapping[Site, torch.Tensor], wanted: Sequence[Site]) -> Any:
    """Return the small store's own values of what is wanted, by which sequence it is."""
    assert set(stored) >= {MLP_IN, MLP_OUT}
    held = values(*MLP_IN.place)
    seqs = [int((held == row).all(dim=(1, 2)).nonzero()) for row in stored[MLP_IN]]
    return {site: values(*site.place, 7)[seqs] for site in wanted}


def whole(root: Path, manifest: Manifest) -> ActivationStore:
    """Write a store and open it."""
    with create(root, manifest) as writer:
        fill(writer)
        writer.finish()
    return ActivationStore.open(root)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_all_sites_come_back(tmp_path: Path, dtype: str, compression: str) -> None:
    store = whole(tmp_path / "acts", mixed(dtype=dtype, compression=compression))
    assert verify_store(store.root, full=True)["ok"]
    step = {"float32": 0.0, "bfloat16": 0.01, "int8": 0.05}[dtype]
    for site, known in values_of(store.manifest).items():
        assert store.width(site) == known.shape[-1]
        assert store.n_nonfinite(site) == 0
        norms, rounded = store.norms(site, range(N_SEQ)), known.norm(dim=-1)
        assert torch.allclose(norms, rounded, rtol=max(step, 1e-6))
        assert store.mean_norm(site) == pytest.approx(float(norms[store.train_seqs].mean()))
        if store.is_stored(site):
            assert torch.allclose(store.values(site, [3, 1]).float(), known[[3, 1]], atol=step)
        assert (store.scales(site) is not None) == (dtype == "int8" and store.is_stored(site))
    assert store.weights("3.mlp")["W_gate"].shape == (2, 3)
    assert (store.root / "weights/3/mlp/W_in").is_dir()
    assert (store.root / "weights/3/W_Q").is_dir()
    assert not (store.root / RESID.path).exists()
    with pytest.raises(StoreError, match="has no weights of 0.mlp; it has 0.attention, 3.att"):
        store.weights("0.mlp")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_batches_are_of_the_sites_of_their_ports(tmp_path: Path, dtype: str) -> None:
    store = whole(tmp_path / "acts", mixed(dtype=dtype))
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=3)
    both = Ports((MLP_IN, Site(0, "attn_in")), (MLP_OUT,))
    for ports in (ports_between(3, "mlp_in", "mlp_out"), both, attention_ports(0)):
        for step, batch in enumerate(batches(store, ports, sampler, first_step=0, n_steps=3)):
            x, y = batch.stored.on("cpu")
            seqs = sampler.batch(step)
            expected = [store.values(site, seqs) for site in ports.reads]
            assert torch.equal(x, expected[0] if len(expected) == 1 else torch.stack(expected))
            assert torch.equal(y, store.values(*ports.writes, seqs))
            assert set(batch.stored.parts) == set(ports.sites)
    (held_out,) = held_out_batches(store, both, batch_seqs=4)
    assert held_out.x.shape == (2, 2, 6, 5)


def test_what_writes_what_it_reads_is_read_once(tmp_path: Path) -> None:
    store = whole(tmp_path / "acts", mixed())
    ports = ports_between(3, "mlp_out", "mlp_out")
    found = store.activations(ports, [4, 2])
    assert found.x is found.y
    before = store.bytes_read
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=4)
    (batch,) = batches(store, ports, sampler, first_step=0, n_steps=1)
    x, y = batch.stored.on("cpu")
    assert x is y
    assert store.bytes_read - before == 4 * (6 * 5 * 4 + 4)  # values and checksums, no norms


def test_a_site_is_derived_from_several(tmp_path: Path) -> None:
    """It is checked by its norms, in batches too, and may stand beside stored ones."""
    store = whole(tmp_path / "acts", mixed())
    assert torch.equal(store.values(RESID, [5, 2], derive), values(*RESID.place, 7)[[5, 2]])
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=3)
    ports = Ports((Site(0, "attn_in"),), (RESID,))
    for step, batch in enumerate(batches(store, ports, sampler, first_step=0, n_steps=2)):
        assert set(batch.stored.parts) == {Site(0, "attn_in"), MLP_IN, MLP_OUT}
        x, y = batch.stored.on("cpu", derive)
        seqs = sampler.batch(step)
        assert torch.equal(x, values(0, 0)[seqs])
        assert torch.equal(y, values(*RESID.place, 7)[seqs])

    def wrong(stored: Any, wanted: Any) -> Any:
        return {site: 1.1 * part for site, part in derive(stored, wanted).items()}

    with pytest.raises(StoreError, match="3.resid_out: what is derived differs"):
        store.values(RESID, [5], wrong)
    with pytest.raises(StoreError, match="does not store 3.resid_out, which is derived; give"):
        store.values(RESID, [5])


def test_what_is_lacking_is_named_with_the_harvest_that_adds_it(make_store: MakeStore) -> None:
    store = ActivationStore.open(make_store(request={"model": "tiny", "dtype": "int8"}))
    for call in (
        lambda: store.require_sites([MLP_OUT, MLP_IN]),
        lambda: store.activations(ports_between(3, "mlp_in", "mlp_out"), [0]),
    ):
        with pytest.raises(StoreError) as raised:
            call()
        assert str(raised.value) == (
            f"layer 3 (mlp) is not in {store.root}; it has layers 0,3 (attn); add it with: "
            f"lorsa harvest --model tiny --layers 3 --sites mlp --store {store.root}"
        )
    with pytest.raises(StoreError, match=r"layer 7 is not in .*; it has layers 0,3; add it with"):
        store.activations(attention_ports(7), [0])
    merged = replace(store.manifest, request={"merged": ["a", "b"]})
    store.manifest = merged
    with pytest.raises(StoreError, match="harvest it into each of the stores that it was merged"):
        store.require_sites([RESID])


@pytest.mark.parametrize(
    ("sites", "text"),
    [
        (attention_ports(3).sites, "layer 3"),
        ([*attention_ports(3).sites, *attention_ports(4).sites], "layers 3-4"),
        ([MLP_OUT, MLP_IN], "layer 3 (mlp)"),
        ([*attention_ports(2).sites, RESID, MLP_IN], "layers 2 (attn), 3 (mlp_in,resid_out)"),
        ([Site(n, "mlp_in") for n in (0, 1, 2, 9)], "layers 0-2,9 (mlp_in)"),
    ],
)
def test_sites_are_told_shortly(sites: Sequence[Site], text: str) -> None:
    assert spell_sites(sites) == text


def added(root: Path, **changes: Any) -> StoreWriter:
    """Begin to add the MLP of layer 3."""
    return add_sites(root, mlp(**changes))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sites_added_to_a_layer_touch_nothing_that_is_there(
    make_store: MakeStore, tmp_path: Path, dtype: str
) -> None:
    root = make_store(dtype=dtype)
    old = {path: path.stat().st_mtime_ns for path in root.rglob("*") if _is_of_arrays(path)}
    with added(root, dtype=dtype) as writer:
        assert writer.sites_to_write == [MLP_IN, MLP_OUT]
        fill(writer, [0, 1])
    assert store_info(root)["adding_sites"] == ["3.mlp_in", "3.mlp_out"]
    assert verify_store(root)["adding_sites"] == ["3.mlp_in", "3.mlp_out"]
    assert not ActivationStore.open(root).has(MLP_IN)
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [2, 3, 4, 5]
        fill(writer)
        writer.finish()
    assert {path: path.stat().st_mtime_ns for path in old} == old
    both = make_manifest(dtype=dtype)
    facts = {"sites": both.sites | MLP["sites"], "modules": both.modules | MLP["modules"]}
    other = whole(tmp_path / "whole", make_manifest(dtype=dtype, **facts))
    assert digests(root) == digests(other.root)
    assert store_info(root) | {"store": ""} == store_info(other.root) | {"store": ""}
    assert verify_store(root, full=True)["ok"]


def _is_of_arrays(path: Path) -> bool:
    return path.is_file() and bool({"layers", "weights", "tokens"} & set(path.parts))


def test_what_cannot_be_added_is_refused(make_store: MakeStore) -> None:
    root = make_store(request={"model": "tiny"})
    added(root).close()
    with pytest.raises(BegunError, match="is given these sites by another process"):
        added(root)
    told = "given layer 3 .mlp.; first end that with: lorsa harvest --model tiny --layers 3 --si"
    with pytest.raises(StoreError, match=told):
        add_sites(root, make_manifest(layers={5: {"weights": []}}))
    with StoreWriter.resume(root) as writer:
        fill(writer)
        writer.finish()
    with pytest.raises(BegunError, match=r"has layer 3 \(mlp\) already"):
        added(root)


def test_a_module_that_is_there_is_not_written_again(make_store: MakeStore) -> None:
    """A removed site comes back to the weights that its layer has kept."""
    root = make_store()
    before = digests(root)
    weights = {p: p.stat().st_mtime_ns for p in (root / "weights").rglob("*")}
    remove_sites(root, sites="3.attn_out")
    site = Site(3, "attn_out")
    facts = {"3.attention": {"weights": ["other"]}}
    with StoreWriter.add_sites(root, {site: SiteFacts(5)}, facts, modules={}) as writer:
        fill(writer)
        writer.finish()
    assert digests(root) == before
    assert {p: p.stat().st_mtime_ns for p in weights} == weights
    assert verify_store(root, full=True)["ok"]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("layers", "names", "left"),
    [
        ("all", "mlp,resid_out", ["3.attn_in", "3.attn_out"]),
        ("3", "attn,resid", ["3.mlp_in", "3.mlp_out"]),
        ("3", "resid_out,3.attn_in", ["3.attn_out", "3.mlp_in", "3.mlp_out"]),
        ("3", "all", []),
    ],
)
def test_removed_sites_were_never_there(
    tmp_path: Path, layers: str, names: str, left: list[str], dtype: str
) -> None:
    manifest = mixed(dtype=dtype)
    root = whole(tmp_path / "acts", manifest).root
    result = remove_sites(root, layers, names)
    sites = ["0.attn_in", "0.attn_out", *left]
    assert result["sites"] == sites
    assert [str(site) for site in ActivationStore.open(root).sites] == sites
    rest = manifest.only([Site.parse(site) for site in sites])
    other = whole(tmp_path / "other", rest)
    assert digests(root) == digests(other.root)
    assert _folders(root) == _folders(other.root)
    assert store_info(root) | {"store": ""} == store_info(other.root) | {"store": ""}
    found = verify_store(root, full=True)
    assert (found["ok"], found["leftovers"]) == (True, [])


def test_a_module_that_another_is_made_of_stays(tmp_path: Path) -> None:
    """A block derives sites by the weights of its attention and its MLP."""
    manifest = mixed()
    block = manifest.modules["3.block"] | {"parts": ["3.attention", "3.mlp"]}
    manifest = replace(manifest, modules=manifest.modules | {"3.block": block})
    root = whole(tmp_path / "acts", manifest).root
    remove_sites(root, "3", "attn")
    assert ActivationStore.open(root).weights("3.attention").keys() == {"W_Q"}
    remove_sites(root, sites="resid_out")
    assert list(read_manifest(root / MANIFEST).modules) == ["0.attention", "3.mlp"]
    assert not (root / "weights/3/W_Q").exists()
    assert verify_store(root, full=True)["ok"]


def _folders(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir()}


@pytest.mark.parametrize(
    ("layers", "names", "message"),
    [
        ("0", "mlp", r"has no layer 0 \(mlp\); it has layers 0 \(attn\), 3 \(attn,mlp,resid_out\)"),
        ("all", "mlp", "3.resid_out is derived from layer 3 .mlp.; remove it too, or leave that"),
        (
            "all",
            "all",
            "has nothing but layers 0 .attn., 3 .attn,mlp,resid_out.; to remove",
        ),
        (
            "all",
            "3.mlp_in,7.mlp_in",
            r"has no layer 7 \(mlp_in\); it has layers 0 .attn., 3 .attn,mlp,re",
        ),
    ],
)
def test_what_cannot_be_removed_is_named(
    tmp_path: Path, layers: str, names: str, message: str
) -> None:
    root = whole(tmp_path / "acts", mixed()).root
    before = digests(root)
    with pytest.raises(StoreError, match=message):
        remove_sites(root, layers, names)
    assert digests(root) == before
    assert verify_store(root, full=True)["ok"]


@pytest.mark.parametrize("names", ["mlp_inn", "attn,3.mlp_inn"])
def test_what_is_no_site_is_wrong_usage(tmp_path: Path, names: str) -> None:
    """With the exit code that it has in every command."""
    root = whole(tmp_path / "acts", mixed()).root
    with pytest.raises(UsageError, match="'mlp_inn' is no site; near: mlp_in"):
        remove_sites(root, sites=names)


def test_a_removal_cut_short_by_the_power_goes_on(tmp_path: Path) -> None:
    """At one change of the disk after the other; what stays opens at each."""
    root = whole(tmp_path / "acts", mixed()).root
    expected = digests(whole(tmp_path / "other", mixed().only(make_manifest().sites)).root)
    moments, at, n_half = random.Random(0), 1, 0
    while True:
        cut = tmp_path / "cut"
        shutil.copytree(root, cut)
        try:
            with power_cut(at):
                remove_sites(cut, "3", "mlp,resid")
            break
        except PowerCutError:
            pass
        store = ActivationStore.open(cut)
        assert torch.equal(store.values(Site(3, "attn_in"), [0]), values(3, 0)[[0]])
        n_half += bool(verify_store(cut)["leftovers"])
        if at % 2:  # whoever removes one of them removes what is left of the others, or nothing
            found = verify_store(cut, full=True)
            assert all("being removed" in damage["problem"] for damage in found["damages"])
        remove_sites(cut, "3", "mlp,resid") if digests(cut) != expected else None
        assert digests(cut) == expected
        assert verify_store(cut, full=True)["ok"]
        shutil.rmtree(cut)
        at += moments.randrange(1, 6)
    assert at > 20
    assert n_half > 2


def test_damage_costs_the_site_in_its_shard_alone(tmp_path: Path) -> None:
    root = whole(tmp_path / "acts", mixed()).root
    before = digests(root)
    (root / MLP_OUT.path / "c/2/0/0").unlink()
    path = root / f"{RESID.path}_norm/c/4/0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = verify_store(root, full=True, repair=True)
    assert found["dropped_shards"] == [2, 4]
    kept = {p: p.stat().st_mtime_ns for p in root.rglob("*") if _is_of_arrays(p)}
    with StoreWriter.resume(root) as writer:
        assert writer.sites_to_write == [MLP_OUT, RESID]
        assert writer.missing_shards() == [2, 4]
        fill(writer)
        writer.finish()
    assert digests(root) == before
    changed = {p.relative_to(root).as_posix() for p in kept if p.stat().st_mtime_ns != kept[p]}
    assert changed == {f"{RESID.path}_norm/c/4/0", f"{MLP_OUT.path}_norm/c/2/0"}
    assert verify_store(root, full=True)["ok"]


def test_a_damaged_weight_of_an_mlp_is_found(tmp_path: Path) -> None:
    root = whole(tmp_path / "acts", mixed()).root
    path = root / "weights/3/mlp/W_in/c/0/0"
    path.write_bytes(bytes(len(path.read_bytes())))
    found = verify_store(root, full=True)
    assert [damage["path"] for damage in found["damages"]] == ["weights/3/mlp/W_in/c/0/0"]
    (root / "weights/3/mlp/zarr.json").unlink()
    found = verify_store(root)
    assert [damage["path"] for damage in found["damages"]] == ["weights/3/mlp/zarr.json"]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_mixed_stores_merge(tmp_path: Path, dtype: str) -> None:
    one = whole(tmp_path / "one", mixed(dtype=dtype))
    manifest = mixed(dtype=dtype, uuid="v")
    held = values_of(manifest)
    with StoreWriter.create(
        tmp_path / "two",
        manifest,
        tokens=tokens() + 1000,
        documents=tokens() % 2,
        document_names=["c", "d"],
        modules=weights_of(manifest),
        sample=held,
    ) as writer:
        fill(writer)
        writer.finish()
    merge_stores([one.root, tmp_path / "two"], tmp_path / "both")
    both = ActivationStore.open(tmp_path / "both")
    assert verify_store(both.root, full=True)["ok"]
    assert both.sites == one.sites
    assert both.manifest.modules == one.manifest.modules
    for site in both.sites:
        assert torch.equal(both.norms(site, range(20)), one.norms(site, range(20)))
        if both.is_stored(site):
            assert torch.equal(both.values(site, range(20)), one.values(site, range(20)))
    other = whole(tmp_path / "less", mixed(dtype=dtype).only(make_manifest().sites))
    with pytest.raises(StoreError, match="cannot be merged: sites is .layers 0 .attn., 3 .attn,m"):
        merge_stores([one.root, other.root], tmp_path / "never")


def test_what_is_not_finite_is_told_by_its_site(tmp_path: Path) -> None:
    manifest = mixed()
    held = {site: part.clone() for site, part in values_of(manifest).items()}
    held[RESID][2, 1, 3] = torch.nan
    with create(tmp_path / "acts", manifest) as writer:
        with pytest.raises(StoreError, match="layers/3/resid_out of sequence 2 is not finite"):
            with writer.shard(0) as session:
                session.append({site: part[:4] for site, part in held.items()})
        with writer.shard(0, keep_nonfinite=True) as session:
            session.append({site: part[:4] for site, part in held.items()})
        fill(writer)
        writer.finish()
    store = ActivationStore.open(tmp_path / "acts")
    assert {site: n for site in store.sites if (n := store.n_nonfinite(site))} == {RESID: 1}
    assert store_info(store.root)["layers"]["3"]["n_nonfinite"] == 1


def test_sites_added_by_processes_that_are_killed_are_as_if_they_had_never_stopped(
    make_store: MakeStore, tmp_path: Path
) -> None:
    root = make_store(shard_seqs=1)
    script = Path(__file__).with_name("team.py")
    command = [sys.executable, script, root, "5", "20", "2", json.dumps({"add": "3.mlp"})]
    done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert done["n_kills"] >= 20
    assert not done["done_early"]
    both = make_manifest(shard_seqs=1)
    facts = {"sites": both.sites | MLP["sites"], "modules": both.modules | MLP["modules"]}
    other = whole(tmp_path / "whole", make_manifest(shard_seqs=1, **facts))
    assert digests(root) == digests(other.root)
    assert verify_store(root, full=True)["ok"]
    assert sites_being_added(root) == []
    assert not list((root / "journal").glob("*.claim"))
