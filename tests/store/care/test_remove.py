"""Layers are removed whole, and the rest is as if they had never been there."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorsa.errors import StoreError
from lorsa.sites import Site, attention_ports
from lorsa.store.care.info import store_info
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.read.reader import ActivationStore
from lorsa.store.write.writer import StoreWriter
from power import PowerCutError, power_cut
from small import N_SEQ, SMALLEST, create, digests, fill, make_manifest, values

MakeStore = Callable[..., Path]
THREE = {layer: {"weights": ["W_Q"]} for layer in (0, 3, 5)}


def _n_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_removed_layers_give_their_bytes_back(make_store: MakeStore) -> None:
    root = make_store(layers=THREE)
    before = _n_bytes(root)
    result = remove_sites(root, "3,5")
    assert (result["removed"], result["layers"]) == ([3, 5], [0])
    assert result["n_bytes"] == pytest.approx(before - _n_bytes(root), abs=6000)  # and metadata
    assert sorted(p.name for p in (root / "layers").iterdir()) == ["0", "zarr.json"]
    assert sorted(p.name for p in (root / "weights").iterdir()) == ["0", "zarr.json"]


@pytest.mark.parametrize("facts", [{}, SMALLEST], ids=["float32", "smallest"])
def test_the_rest_is_as_if_they_had_never_been_there(
    make_store: MakeStore, facts: dict[str, str]
) -> None:
    root = make_store(**facts)
    other = make_store("other", layers={0: {"weights": ["W_Q"]}}, **facts)
    x = ActivationStore.open(root).values(Site(0, "attn_in"), range(N_SEQ))
    remove_sites(root, "3")
    assert not (root / "layers/3").exists()
    assert digests(root) == digests(other)
    assert verify_store(root, full=True)["ok"]
    assert store_info(root) | {"store": ""} == store_info(other) | {"store": ""}
    store = ActivationStore.open(root)
    assert torch.equal(store.values(Site(0, "attn_in"), range(N_SEQ)), x)
    with pytest.raises(StoreError, match=r"layer 3 is not in .*; it has layer 0"):
        store.activations(attention_ports(3), [0])


def test_an_unfinished_store_goes_on_without_them(tmp_path: Path, make_store: MakeStore) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        fill(writer, [0, 1])
    remove_sites(root, "3")
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [2, 3, 4, 5]
        fill(writer)
        writer.finish()
    assert digests(root) == digests(make_store("other", layers={0: {"weights": ["W_Q"]}}))
    assert verify_store(root, full=True)["ok"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0,3", "has nothing but layers 0,3; to remove the whole store, delete its folder"),
        ("all", "has nothing but layers 0,3"),
        ("7", "layer 7 is not in .*; it has layers 0,3"),
        ("../x", "not of the form 0-27"),
    ],
)
def test_what_cannot_be_removed_is_named(make_store: MakeStore, layers: str, message: str) -> None:
    root = make_store()
    before = digests(root)
    with pytest.raises(StoreError, match=message):
        remove_sites(root, layers)
    assert digests(root) == before
    assert verify_store(root, full=True)["ok"]


def test_a_store_that_is_being_written_keeps_its_layers(tmp_path: Path) -> None:
    with create(tmp_path / "acts", make_manifest()):
        with pytest.raises(StoreError, match="is being written by another process"):
            remove_sites(tmp_path / "acts", "3")


def test_a_folder_that_is_no_store_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "layers/3").mkdir(parents=True)
    with pytest.raises(StoreError, match="is no activation store"):
        remove_sites(tmp_path, "3")
    assert (tmp_path / "layers/3").exists()


@pytest.mark.parametrize("room", ["layers/3", "weights/3", "layers"])
def test_a_link_that_leads_out_of_the_store_is_not_followed(
    make_store: MakeStore, tmp_path: Path, room: str
) -> None:
    root = make_store()
    shutil.move(root / room, tmp_path / "elsewhere")
    (root / room).symlink_to(tmp_path / "elsewhere")
    n_files = len(list((tmp_path / "elsewhere").rglob("*")))
    with pytest.raises(StoreError, match="is a link that leads out of the store"):
        remove_sites(root, "3")
    assert len(list((tmp_path / "elsewhere").rglob("*"))) == n_files
    assert verify_store(root, full=True)["ok"]  # reading through a link is fine


def test_a_link_to_a_folder_of_the_store_is_not_followed(make_store: MakeStore) -> None:
    """It was "cannot be removed (None); the same command goes on", each time."""
    root = make_store()
    shutil.move(root / "layers/3", root / "kept")
    (root / "layers/3").symlink_to(root / "kept")
    with pytest.raises(StoreError, match="layers/3 is a link that points into the store"):
        remove_sites(root, "3")
    assert verify_store(root, full=True)["ok"]
    (root / "layers/3").unlink()
    shutil.rmtree(root / "kept")
    assert remove_sites(root, "3")["layers"] == [0]


@pytest.mark.parametrize("finished", [True, False])
def test_a_removal_that_is_cut_short_leaves_a_store_that_opens(
    make_store: MakeStore, tmp_path: Path, finished: bool
) -> None:
    """The power goes at one change of the disk after the other, then the same command again."""
    whole = make_store("whole")
    if not finished:
        (whole / "manifest.json").unlink()
    expected = digests(make_store("other", layers={0: {"weights": ["W_Q"]}}))
    for at in range(1, 200, 1 if finished else 3):
        root = tmp_path / f"cut{at}"
        shutil.copytree(whole, root)
        try:
            with power_cut(at):
                remove_sites(root, "3")
            break
        except PowerCutError:
            pass
        if finished:
            store = ActivationStore.open(root)
            assert torch.equal(store.activations(attention_ports(0), range(N_SEQ)).x, values(0, 0))
            result = verify_store(root)
            assert all("lorsa store rm" in damage["problem"] for damage in result["damages"])
            left = store.layers == [0] and (root / "layers/3").exists()
            assert ("layers/3" in result["leftovers"]) is left
        if 3 in _layers(root) or (root / "layers/3").exists():
            assert remove_sites(root, "3")["layers"] == [0]
        assert _layers(root) == [0]
        assert not (root / "layers/3").exists()
        assert not (root / "weights/3").exists()
        assert digests(root) == expected
        assert finished is verify_store(root, full=True)["ok"]
    assert at > 20


def _layers(root: Path) -> list[int]:
    return [int(layer) for layer in store_info(root)["layers"]]


def test_a_removal_that_was_cut_short_is_told_of(make_store: MakeStore) -> None:
    root = make_store()
    copy = root.with_name("copy")
    shutil.copytree(root / "layers/3", copy)
    remove_sites(root, "3")
    shutil.move(copy, root / "layers/3")
    result = verify_store(root)
    assert result["ok"]
    assert result["leftovers"] == ["layers/3"]
    assert remove_sites(root, "3")["n_bytes"] > 0
    assert verify_store(root)["leftovers"] == []


def test_a_full_disk_can_be_made_room_on(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be written until something is deleted, which is what the command is for."""
    root = make_store()
    real = os.replace

    def full(*args: object) -> None:
        if (root / "layers/3").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", full)
    assert remove_sites(root, "3")["layers"] == [0]
    assert verify_store(root, full=True)["ok"]


def test_a_disk_that_refuses_is_one_line(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_store()

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(StoreError, match="layer 3 of .* cannot be removed .Input/output error"):
        remove_sites(root, "3")
    assert verify_store(root, full=True)["ok"]
