"""Everything that is wrong with a store is found, and what can be is mended."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.errors import StoreError
from lorsa.sites import Site, attention_ports
from lorsa.store.care.repair import verify_store
from lorsa.store.fixed import write_array
from lorsa.store.folder import is_complete
from lorsa.store.manifest import read_manifest
from lorsa.store.read.reader import ActivationStore
from lorsa.store.write.writer import StoreWriter
from power import PowerCutError, power_cut
from small import N_SEQ, SMALLEST, create, digests, edit_manifest, fill, make_manifest, values

MakeStore = Callable[..., Path]


def _flip(path: Path, at: int = 10) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _go_on(root: Path) -> None:
    """Write what is missing, as the harvest would."""
    with StoreWriter.resume(root) as writer:
        fill(writer)
        writer.finish()


def _damages(root: Path, **options: Any) -> dict[str, str]:
    return {d["path"]: d["fix"] for d in verify_store(root, **options)["damages"]}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_whole_store_is_whole(make_store: MakeStore, compression: str, full: bool) -> None:
    root = make_store(compression=compression)
    seen = []
    result = verify_store(root, full=full, report=seen.append)
    assert result["ok"]
    assert result["complete"]
    assert result["next"] is None
    assert (result["n_files"], result["n_missing_shards"]) == (6 * 10, 0)
    rooms = (root / name for name in ("tokens", "documents", "layers"))
    shards = [path for room in rooms for path in room.rglob("c/**/*") if path.is_file()]
    assert result["n_bytes"] == sum(path.stat().st_size for path in shards)
    assert ([e.n_bytes for e in seen][-1:] == [result["n_bytes"]]) is full


@pytest.mark.parametrize(
    ("name", "damage", "fix", "needs_full"),
    [
        ("layers/3/attn_in/c/1/0/0", _flip, "harvest", True),
        ("layers/3/attn_in/c/1/0/0", _cut, "harvest", False),
        ("layers/0/attn_in_norm/c/5/0", Path.unlink, "harvest", False),
        ("tokens/c/0/0", _flip, "none", True),
        ("documents/c/3/0", Path.unlink, "none", False),
        ("documents.parquet", _cut, "none", False),
        ("weights/3/W_Q/c/0/0", _flip, "none", True),
        ("weights/3/W_Q/c/0/0", _cut, "none", False),
        ("weights/0/W_Q/zarr.json", Path.unlink, "none", False),
        ("layers/3/attn_in/zarr.json", _cut, "rewrite", False),
        ("tokens/zarr.json", Path.unlink, "rewrite", False),
        ("zarr.json", Path.unlink, "rewrite", False),
        ("weights/zarr.json", _cut, "rewrite", False),
        ("manifest.json", _cut, "rewrite", False),
        ("shards.parquet", _cut, "rewrite", False),
        ("shards.parquet", Path.unlink, "rewrite", False),
        ("journal/plan.json", _cut, "rewrite", False),
        ("journal/text.jsonl", _flip, "rewrite", False),
        ("journal/w000001.jsonl", _flip, "rewrite", False),
    ],
)
def test_each_damage_is_found_and_mended_if_it_can_be(
    make_store: MakeStore,
    name: str,
    damage: Callable[[Path], None],
    fix: str,
    needs_full: bool,
) -> None:
    root = make_store()
    before = digests(root)
    damage(root / name)
    quick, full = _damages(root), _damages(root, full=True)
    assert full == {name: fix}, "a damaged weight was told by its array, not by its file"
    assert quick == ({} if needs_full else full)
    result = verify_store(root, full=True, repair=True)
    assert result["ok"] is (fix == "rewrite")
    if fix == "harvest":
        assert not is_complete(root)
        assert result["next"].startswith("lorsa harvest --model tiny --layers 0,3")
        with pytest.raises(StoreError, match="is unfinished"):
            ActivationStore.open(root)
        _go_on(root)
    if fix != "none":
        assert verify_store(root, full=True)["ok"]
        assert digests(root) == before


@pytest.mark.parametrize(
    ("name", "damage", "fix", "needs_full"),
    [
        ("attn_in_channel/c/0", _flip, "none", True),
        ("attn_in_channel/c/0", _cut, "none", False),
        ("attn_in_channel", shutil.rmtree, "none", False),
        ("attn_in_scale/c/1/0", _flip, "harvest", True),
        ("attn_in_scale/c/1/0", Path.unlink, "harvest", False),
        ("attn_in_scale/zarr.json", _cut, "rewrite", False),
        ("attn_in_norm/c/5/0", _cut, "harvest", False),
    ],
)
def test_each_damage_of_a_smallest_store_too(
    make_store: MakeStore, name: str, damage: Callable[[Path], None], fix: str, needs_full: bool
) -> None:
    root = make_store(**SMALLEST)
    assert verify_store(root, full=True)["ok"]
    before = digests(root)
    damage(root / "layers/3" / name)
    file = f"{name}/zarr.json" if damage is shutil.rmtree else name
    found = {f"layers/3/{file}": fix}
    assert _damages(root, full=True) == found
    assert _damages(root) == ({} if needs_full else found)
    assert verify_store(root, full=True, repair=True)["ok"] is (fix == "rewrite")
    if fix == "none":
        with pytest.raises(StoreError, match="attn_in_channel cannot be read .*restore it from"):
            ActivationStore.open(root).values(Site(3, "attn_in"), [0])
        return
    if fix == "harvest":
        assert not is_complete(root)
        _go_on(root)
    assert verify_store(root, full=True)["ok"]
    assert digests(root) == before


def test_channels_of_another_width_are_named(make_store: MakeStore) -> None:
    root = make_store(**SMALLEST)
    changed = write_array(root, "layers/3/attn_in_channel", torch.ones(4))
    edit_manifest(root, checksums=read_manifest(root / "manifest.json").checksums | changed)
    shutil.copy(root / "manifest.json", root / "journal/plan.json")
    (damage,) = verify_store(root)["damages"]
    assert damage["problem"] == "has the shape [4] instead of [5]"
    (root / "layers/3/attn_in/c/0/0/0").unlink()
    with pytest.raises(StoreError, match=r"channel is torch.float32 \[4\], not float32 \[5\]"):
        StoreWriter.resume(root).shard(0).__enter__()


def test_all_damages_are_listed_and_only_their_shards_are_written_again(
    make_store: MakeStore,
) -> None:
    root = make_store()
    before = digests(root)
    _flip(root / "layers/3/attn_in/c/1/0/0")
    _cut(root / "layers/0/attn_out/c/1/0/0")
    (root / "layers/0/attn_in_norm/c/4/0").unlink()
    (root / "layers/0/attn_in/zarr.json").write_text("{")
    assert len(_damages(root, full=True)) == 4
    result = verify_store(root, full=True, repair=True)
    assert result["dropped_shards"] == [1, 4]
    assert (root / "layers/3/attn_in/c/1/0/0").exists()  # until another takes its place
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [1, 4]
        fill(writer)
        writer.finish()
    assert digests(root) == before
    assert verify_store(root, full=True)["ok"]


def test_a_store_that_cannot_be_finished_again_is_left_as_it_is(make_store: MakeStore) -> None:
    """Without its token ids no harvest goes on: what can still be read must stay readable."""
    root = make_store()
    _flip(root / "tokens/c/0/0")
    _flip(root / "layers/3/attn_in/c/1/0/0")
    result = verify_store(root, full=True, repair=True)
    assert not result["ok"]
    assert result["dropped_shards"] == []
    assert result["next"] is None
    assert torch.equal(
        ActivationStore.open(root).activations(attention_ports(0), range(N_SEQ)).x, values(0, 0)
    )


def test_an_array_that_contradicts_the_manifest_is_named(make_store: MakeStore) -> None:
    root = make_store()
    path = root / "layers/0/attn_in_norm/zarr.json"
    path.write_text(path.read_text().replace('"float32"', '"float64"', 1))
    with pytest.raises(StoreError, match="attn_in_norm/zarr.json says .* float64; the man"):
        ActivationStore.open(root)
    (damage,) = verify_store(root)["damages"]
    assert damage["problem"] == 'has another data_type than the manifest: "float64"'


def test_a_manifest_that_is_not_the_plan_is_not_believed(make_store: MakeStore) -> None:
    root = make_store()
    edit_manifest(root, n_ctx=7)
    result = verify_store(root, repair=True)
    assert "says another n_ctx than journal/plan.json" in result["damages"][0]["problem"]
    assert result["damages"][0]["path"] == "manifest.json"
    assert not result["ok"]


def test_another_format_version_is_left_alone(make_store: MakeStore) -> None:
    root = make_store()
    edit_manifest(root, format_version=3)
    before = (root / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match="format version 3; this version of lorsa reads 1"):
        verify_store(root, repair=True)
    assert (root / "manifest.json").read_bytes() == before


def test_a_folder_that_is_no_store_is_not_touched(tmp_path: Path) -> None:
    for repair in (False, True):
        with pytest.raises(StoreError, match="is no activation store"):
            verify_store(tmp_path, repair=repair)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lost", "damaged"),
    [
        ("journal/*", {"journal", "journal/plan.json"}),
        ("journal/*.jsonl", {"journal"}),
        ("journal/text.jsonl", {"journal"}),
        ("journal/plan.json", {"journal/plan.json"}),
    ],
)
def test_a_store_without_its_journal_can_be_repaired(
    make_store: MakeStore, lost: str, damaged: set[str]
) -> None:
    """It was called whole, and no harvest could go on once a shard was lost too."""
    root = make_store()
    before = digests(root)
    for path in root.glob(lost):
        path.unlink()
    assert _damages(root) == _damages(root, full=True) == dict.fromkeys(damaged, "rewrite")
    assert verify_store(root, repair=True)["ok"]
    assert verify_store(root, full=True)["damages"] == []
    for path in root.glob(lost):
        path.unlink()
    (root / "layers/3/attn_in/c/1/0/0").unlink()
    assert verify_store(root, repair=True)["dropped_shards"] == [1]
    _go_on(root)
    assert digests(root) == before


def test_an_unfinished_store_is_not_whole(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        fill(writer, [0, 2])
    result = verify_store(root, full=True)
    assert not result["ok"]
    assert (result["n_missing_shards"], result["damages"]) == (4, [])
    assert not verify_store(root, repair=True)["ok"]  # it was, though nothing was mended
    _flip(root / "layers/0/attn_in/c/2/0/0")
    assert verify_store(root, full=True, repair=True)["dropped_shards"] == [2]
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [1, 2, 3, 4, 5]
        fill(writer)
    result = verify_store(root, repair=True)  # every shard is there: nothing but the end is missing
    assert result["ok"]
    assert result["complete"]
    assert torch.equal(
        ActivationStore.open(root).activations(attention_ports(3), range(N_SEQ)).y, values(3, 1)
    )


def test_a_store_that_is_being_written_is_not_repaired(tmp_path: Path) -> None:
    with create(tmp_path / "acts", make_manifest()):
        with pytest.raises(StoreError, match="is being written by another process"):
            verify_store(tmp_path / "acts", repair=True)


def test_a_repair_that_is_cut_short_is_ended_by_the_next(
    make_store: MakeStore, tmp_path: Path
) -> None:
    """The power goes at every change of the disk in turn; what is whole is never lost."""
    damaged = make_store("damaged")
    before = digests(damaged)
    _flip(damaged / "layers/3/attn_in/c/1/0/0")
    (damaged / "layers/0/attn_in_norm/zarr.json").unlink()
    _flip(damaged / "journal/w000001.jsonl")
    for at in range(1, 100):
        root = tmp_path / f"cut{at}"
        shutil.copytree(damaged, root)
        try:
            with power_cut(at):
                verify_store(root, full=True, repair=True)
            break
        except PowerCutError:
            pass
        verify_store(root, full=True, repair=True)
        assert not is_complete(root)
        with StoreWriter.resume(root) as writer:
            assert 1 in writer.missing_shards()
            fill(writer)
            writer.finish()
        assert digests(root) == before
        assert verify_store(root, full=True)["ok"]
    assert at > 5


def test_a_full_disk_or_one_that_is_only_read_is_one_line(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_store()
    (root / "layers/0/attn_in_norm/zarr.json").unlink()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(StoreError, match="cannot be repaired .No space.*run the same command"):
            verify_store(root, repair=True)
    assert verify_store(root, repair=True)["ok"]


def test_a_file_in_the_place_of_another_is_named(make_store: MakeStore) -> None:
    """A file's checksum was that of any other of its size: swapped or old, it was called whole."""
    root = make_store()
    files = [root / f"layers/3/attn_in/c/{shard}/0/0" for shard in (0, 1)]
    shutil.copy(files[0], files[1])
    assert verify_store(root)["ok"]
    (damage,) = verify_store(root, full=True)["damages"]
    assert (damage["path"], damage["fix"]) == ("layers/3/attn_in/c/1/0/0", "harvest")
    assert "not the file that was committed" in damage["problem"]
    assert verify_store(root, full=True, repair=True)["dropped_shards"] == [1]
    _go_on(root)
    assert verify_store(root, full=True)["ok"]
    assert torch.equal(
        ActivationStore.open(root).activations(attention_ports(3), range(N_SEQ)).x, values(3, 0)
    )
