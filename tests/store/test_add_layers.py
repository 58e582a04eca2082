"""Layers are added to a finished store, which stays readable and ends as if all had been there."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.errors import BegunError, StoreError
from lorsa.sites import Site, attention_ports
from lorsa.store.care.info import store_info
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import sites_being_added
from lorsa.store.read.reader import ActivationStore
from lorsa.store.spelling import layers_of
from lorsa.store.write.writer import StoreWriter
from power import PowerCutError, power_cut
from small import N_SEQ, SMALLEST, add_layers, create, digests, fill, make_manifest, pair, values

MakeStore = Callable[..., Path]
FACTS = {"weights": ["W_Q"]}
ALL = dict.fromkeys((0, 3, 5, 7), FACTS)


def _sites(*layers: int) -> list[Site]:
    return [site for layer in layers for site in attention_ports(layer).sites]


def _being_added(root: Path) -> list[int]:
    found = sites_being_added(root)
    assert found == _sites(*layers_of(found))
    return layers_of(found)


def readable(root: Path) -> bool:
    """Tell whether readers see the layers that the store had, and those alone."""
    store = ActivationStore.open(root)
    assert torch.equal(store.activations(attention_ports(3), range(N_SEQ)).y, values(3, 1))
    return store.layers == [0, 3]


@pytest.mark.parametrize("facts", [{}, SMALLEST], ids=["float32", "smallest"])
def test_layers_added_are_as_if_they_had_always_been_there(
    make_store: MakeStore, facts: dict[str, Any]
) -> None:
    root = make_store(**facts)
    old = {path: path.stat().st_mtime_ns for path in (root / "layers/3").rglob("*")}
    with add_layers(root, [5, 7]) as writer:
        assert writer.sites_to_write == _sites(5, 7)
        assert len(writer.missing_shards()) == 6
        assert ActivationStore.open(root).layers == [0, 3]
        fill(writer)
        assert ActivationStore.open(root).layers == [0, 3]
        writer.finish()
    assert {path: path.stat().st_mtime_ns for path in (root / "layers/3").rglob("*")} == old
    whole = make_store("whole", layers=ALL, **facts)
    assert digests(root) == digests(whole)
    assert verify_store(root, full=True)["ok"]
    assert store_info(root) | {"store": ""} == store_info(whole) | {"store": ""}


def test_an_addition_under_way_is_told_of(make_store: MakeStore) -> None:
    root = make_store(request={"model": "tiny"})
    add_layers(root, [5, 7]).close()
    with StoreWriter.resume(root) as writer:
        assert writer.sites_to_write == _sites(5, 7)
        fill(writer, [0, 2])
    assert _being_added(root) == [5, 7]
    assert readable(root)
    going_on = f"lorsa harvest --model tiny --layers 5,7 --store {root}"
    info = store_info(root)
    assert list(info["layers"]) == ["0", "3"]
    assert (info["complete"], info["adding"], info["n_missing_shards"]) == (False, [5, 7], 4)
    assert info["next"] == going_on
    for options in ({}, {"full": True}, {"repair": True}):
        found = verify_store(root, **options)
        assert (found["ok"], found["damages"], found["leftovers"]) == (False, [], [])
        assert (found["complete"], found["adding"], found["next"]) == (False, [5, 7], going_on)
        assert found["n_missing_shards"] == 4
    with pytest.raises(StoreError, match="is being given layers 5,7; first end that with: lorsa h"):
        add_layers(root, [6])
    with pytest.raises(BegunError, match="is given these sites by another process"):
        add_layers(root, [5, 7])
    assert readable(root)
    with StoreWriter.resume(root) as writer:
        fill(writer)
        # stopped before the end: all is written, and nothing says so yet
    assert readable(root)
    assert store_info(root)["next"] == going_on
    assert verify_store(root, repair=True)["ok"]
    assert ActivationStore.open(root).layers == [0, 3, 5, 7]


def _add_without_weights(root: Path) -> None:
    more = make_manifest(layers={5: FACTS})
    StoreWriter.add_sites(root, more.sites, more.modules, modules={"5.attention": {}})


def test_what_cannot_be_added_is_refused(make_store: MakeStore, tmp_path: Path) -> None:
    root = make_store()
    with pytest.raises(BegunError, match=f"{root} has layer 3 already"):
        add_layers(root, [3, 5])
    with pytest.raises(ValueError, match="weights are not those"):
        _add_without_weights(root)
    with pytest.raises(StoreError, match="does not exist"):
        add_layers(tmp_path / "nothing", [5])
    begun = tmp_path / "begun"
    with create(begun, make_manifest()) as writer:
        with pytest.raises(StoreError, match="is unfinished: run the same lorsa harvest"):
            add_layers(begun, [5])
        fill(writer)
        writer.finish()
    path = root / "layers/3/attn_in/c/1/0/0"
    path.rename(root / "lost")
    with pytest.raises(StoreError, match="lacks files; first: lorsa store verify .* --repair"):
        add_layers(root, [5])
    (root / "lost").rename(path)
    assert readable(root)
    assert verify_store(root)["ok"]


def test_a_batch_holds_the_new_layers_alone(make_store: MakeStore) -> None:
    root = make_store()
    with add_layers(root, [5]) as writer, writer.shard(0) as session:
        x, y = values(5, 0)[:4], values(5, 1)[:4]
        told = "batch has 3.attn_in, 3.attn_out, 5.attn_in, 5.attn_out; to write: 5.attn_in, "
        with pytest.raises(ValueError, match=told):
            session.append(pair(3, x, y) | pair(5, x, y))
        session.append(pair(5, x, y))


def test_a_lost_file_costs_its_site_in_its_shard(make_store: MakeStore) -> None:
    """Also during an addition, which another process goes on with for its own sites."""
    root = make_store()
    whole = digests(make_store("whole", layers=dict.fromkeys((0, 3, 5), FACTS)))
    (root / "layers/3/attn_in_norm/c/2/0").unlink()
    with StoreWriter.resume(root) as writer:
        assert (writer.sites_to_write, writer.missing_shards()) == ([Site(3, "attn_in")], [2])
        fill(writer)
        writer.finish()
    with add_layers(root, [5]) as writer:
        fill(writer, [0])
        (root / "layers/3/attn_in_norm/c/2/0").unlink()
        fill(writer)
        with pytest.raises(StoreError, match="lacks 1 shards; run the harvest again"):
            writer.finish()
    with StoreWriter.resume(root) as writer:
        assert (writer.sites_to_write, writer.missing_shards()) == ([Site(3, "attn_in")], [2])
        fill(writer)
        writer.finish()
    assert digests(root) == whole
    assert verify_store(root, full=True)["ok"]


def test_a_file_of_an_old_layer_lost_during_an_addition_is_mended(make_store: MakeStore) -> None:
    root = make_store()
    with add_layers(root, [5]) as writer:
        fill(writer, [0, 1])
    (root / "layers/5/attn_in_norm/c/1/0").unlink()
    found = verify_store(root, repair=True)
    assert (found["dropped_shards"], readable(root)) == ([1], True)
    (root / "shards.parquet").unlink()
    (root / "layers/5/attn_in_norm/zarr.json").unlink()
    verify_store(root, repair=True)
    assert readable(root)
    (root / "layers/3/attn_in_norm/c/1/0").unlink()
    assert verify_store(root, repair=True)["dropped_shards"] == [1]
    with pytest.raises(StoreError, match="is unfinished"):
        ActivationStore.open(root)
    with StoreWriter.resume(root) as writer:
        assert writer.sites_to_write == [Site(3, "attn_in"), *_sites(5)]
        shards = writer.missing_shards()
        assert shards == [1, 2, 3, 4, 5]
        before = (root / "layers/3/attn_in_norm/c/2/0").stat().st_mtime_ns
        fill(writer)
        writer.finish()
    assert (root / "layers/3/attn_in_norm/c/2/0").stat().st_mtime_ns == before
    assert digests(root) == digests(make_store("whole", layers=dict.fromkeys((0, 3, 5), FACTS)))
    assert verify_store(root, full=True)["ok"]


def test_a_layer_that_is_being_added_can_be_removed(make_store: MakeStore) -> None:
    root = make_store()
    before = digests(root)
    with add_layers(root, [5, 7]) as writer:
        fill(writer, [0, 1])
    assert remove_sites(root, "5")["layers"] == [0, 3, 7]
    assert (_being_added(root), readable(root)) == ([7], True)
    with pytest.raises(StoreError, match="has nothing but layers 0,3; to remove the whole store"):
        remove_sites(root, "0,3")
    assert remove_sites(root, "7")["layers"] == [0, 3]
    assert (_being_added(root), readable(root)) == ([], True)
    assert digests(root) == before
    assert verify_store(root, full=True)["ok"]
    with add_layers(root, [5]) as writer:  # what the journal told of it is forgotten
        assert writer.missing_shards() == list(range(6))


def test_an_old_layer_can_be_removed_during_an_addition(make_store: MakeStore) -> None:
    root = make_store()
    with add_layers(root, [5]) as writer:
        fill(writer, [0, 1])
    assert remove_sites(root, "0")["layers"] == [3, 5]
    assert ActivationStore.open(root).layers == [3]
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [2, 3, 4, 5]
        fill(writer)
        writer.finish()
    assert digests(root) == digests(make_store("whole", layers=dict.fromkeys((3, 5), FACTS)))
    assert verify_store(root, full=True)["ok"]


def test_a_layer_removed_and_added_again_is_the_same(make_store: MakeStore) -> None:
    root = make_store()
    before = digests(root)
    remove_sites(root, "3")
    with add_layers(root, [3]) as writer:
        fill(writer)
        writer.finish()
    assert digests(root) == before
    assert verify_store(root, full=True)["ok"]


def test_an_addition_cut_short_by_the_power_goes_on(make_store: MakeStore, tmp_path: Path) -> None:
    """At one change of the disk after the other; the old layers are there at each."""
    whole = make_store()
    expected = digests(make_store("other", layers=dict.fromkeys((0, 3, 5), FACTS)))
    moments = random.Random(0)
    at, n_begun = 1, 0
    while True:
        root = tmp_path / "cut"
        shutil.copytree(whole, root)
        try:
            with power_cut(at):
                with add_layers(root, [5]) as writer:
                    fill(writer)
                    writer.finish()
            break
        except PowerCutError:
            pass
        assert ActivationStore.open(root).layers in ([0, 3], [0, 3, 5])
        assert verify_store(root, full=True)["damages"] == []
        begun = _being_added(root) or ActivationStore.open(root).layers == [0, 3, 5]
        n_begun += bool(begun)
        with StoreWriter.resume(root) if begun else add_layers(root, [5]) as writer:
            fill(writer)
            writer.finish()
        assert digests(root) == expected
        assert verify_store(root, full=True)["ok"]
        assert verify_store(root)["leftovers"] == []
        shutil.rmtree(root)
        at += moments.randrange(2, 24)
    assert at > 100
    assert n_begun > 5


def test_an_addition_by_processes_that_are_killed_is_as_if_it_had_never_stopped(
    make_store: MakeStore,
) -> None:
    root = make_store(shard_seqs=1)
    script = Path(__file__).with_name("team.py")
    command = [sys.executable, script, root, "2", "10", "2", json.dumps({"add": [5, 7]})]
    seen: list[list[int]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while process.poll() is None:  # whoever reads it meanwhile sees all of a layer or nothing
            seen.append(ActivationStore.open(root).layers)
            time.sleep(0.02)
        assert process.stdout is not None
        done = json.loads(process.stdout.read())
    assert seen[0] == [0, 3]
    assert all(layers in ([0, 3], [0, 3, 5, 7]) for layers in seen)
    assert done["n_kills"] >= 10
    assert not done["done_early"]
    assert digests(root) == digests(make_store("whole", shard_seqs=1, layers=ALL))
    assert verify_store(root, full=True)["ok"]
    assert not list((root / "journal").glob("*.claim"))
