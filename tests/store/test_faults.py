"""Kills, flipped bytes, full disks, disks that are only read, damaged indices: nothing is lost."""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lorsa.errors import StoreError
from lorsa.sites import Site, attention_ports
from lorsa.store.care.info import store_info
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import is_begun, is_complete
from lorsa.store.read.reader import ActivationStore
from lorsa.store.write.writer import StoreWriter
from small import N_SEQ, SMALLEST, create, digests, fill, make_manifest, values

MakeStore = Callable[..., Path]
N_KILLS, N_FLIPS, N_FUZZ = 30, 200, 300


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk that is quick to flush, if there is one."""
    room = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=room if room.is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("facts", [{}, SMALLEST], ids=["float32", "smallest"])
def test_thirty_kills_at_random_moments_change_nothing(
    in_memory: Path, facts: dict[str, str]
) -> None:
    """Each is followed by going on; the stores are to the byte one that was never killed."""
    script = Path(__file__).with_name("drill.py")
    command = [sys.executable, script, in_memory, "1", str(N_KILLS), json.dumps(facts)]
    done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert len(done["stages"]) == N_KILLS
    assert {"begin", "shards"} <= set(done["stages"])
    whole = digests(in_memory / "never-killed")
    for name in done["finished"]:
        assert digests(in_memory / name) == whole
        assert verify_store(in_memory / name, full=True)["ok"]
        assert not list((in_memory / name / "layers").rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("layers/3/attn_in/c/1/0/0", {}),
        ("layers/3/attn_in/c/1/0/0", {"compression": "zstd"}),
        ("layers/3/attn_in/c/1/0/0", SMALLEST | {"compression": "zstd"}),
        ("layers/3/attn_in_scale/c/1/0", SMALLEST),
    ],
)
def test_every_flipped_byte_is_found_by_verify_and_by_a_read(
    make_store: MakeStore, name: str, facts: dict[str, str]
) -> None:
    root = make_store(**facts)
    path, store = root / name, ActivationStore.open(root)
    good, x = path.read_bytes(), store.values(Site(3, "attn_in"), range(N_SEQ))
    places = random.Random(0)
    for _ in range(N_FLIPS // 4):
        at, bit = places.randrange(len(good)), 1 << places.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        assert [d["path"] for d in verify_store(root, full=True)["damages"]] == [name]
        with pytest.raises(StoreError, match=f"{path} .*lorsa store verify {root} --full --repair"):
            ActivationStore.open(root).values(Site(3, "attn_in"), range(4, 8))
    path.write_bytes(good)
    assert torch.equal(store.values(Site(3, "attn_in"), range(N_SEQ)), x)


class Disk:
    """A small disk in memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=64k", "lorsa-test")

    def change(self, options: str) -> None:
        """Change its size, or whether it can be written."""
        self._mount("-o", f"remount,{options}")

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", self.root], check=True)

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, self.root], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine lets nobody mount a small disk: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 64 kB."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.remove()


@pytest.mark.parametrize("size_kb", [20, 60, 100, 164, 212, 260])
def test_a_full_disk_is_one_line_and_room_lets_it_go_on(
    make_store: MakeStore, disk: Disk, size_kb: int
) -> None:
    root = disk.root / "acts"
    disk.change(f"size={size_kb}k")

    def write() -> None:
        begun = is_begun(root)
        with StoreWriter.resume(root) if begun else create(root, make_manifest()) as writer:
            fill(writer)
            writer.finish()

    for _ in range(2):  # and again while it is still full
        with pytest.raises(StoreError, match="No space left on device") as caught:
            write()
        assert "\n" not in str(caught.value)
    if is_begun(root):
        info = store_info(root)
        assert not info["complete"]
        n_there = info["n_shards"] - info["n_missing_shards"]
        assert verify_store(root, full=True)["damages"] == []
        disk.change("size=2m")
        with StoreWriter.resume(root) as writer:
            assert len(writer.missing_shards()) == info["n_shards"] - n_there
    disk.change("size=2m")
    write()
    assert digests(root) == digests(make_store("whole"))
    assert verify_store(root, full=True)["ok"]


def test_layers_can_be_removed_from_a_full_disk(make_store: MakeStore, disk: Disk) -> None:
    root = disk.root / "acts"
    disk.change("size=2m")
    shutil.copytree(make_store(), root)
    with suppress(OSError), (disk.root / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert remove_sites(root, "3")["layers"] == [0]
    assert verify_store(root, full=True)["ok"]


def test_a_disk_that_is_only_read_is_read_and_says_so(make_store: MakeStore, disk: Disk) -> None:
    root = disk.root / "acts"
    disk.change("size=2m")
    shutil.copytree(make_store(), root)
    shutil.copytree(root, disk.root / "unfinished")
    (disk.root / "unfinished/manifest.json").unlink()
    disk.change("ro")
    try:
        store = ActivationStore.open(root)
        assert torch.equal(store.activations(attention_ports(3), range(N_SEQ)).y, values(3, 1))
        assert verify_store(root, full=True)["ok"]
        assert store_info(root)["complete"]
        assert not store_info(disk.root / "unfinished")["complete"]
        for change in (
            lambda: remove_sites(root, "3"),
            lambda: verify_store(root, repair=True),
            lambda: StoreWriter.resume(disk.root / "unfinished"),
        ):
            with pytest.raises(
                StoreError, match=r"cannot be written .Read-only file system., only"
            ):
                change()
        with pytest.raises(StoreError, match="cannot be"):
            create(disk.root / "new", make_manifest())
    finally:
        disk.change("rw")


def _damage(content: bytes, moments: random.Random) -> bytes:
    """Return a file's content after something happened to it."""
    at, n = moments.randrange(len(content)), moments.randrange(1, 40)
    match moments.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[at + n :]
        case 2:
            return content[:at] + moments.randbytes(n) + content[at + n :]
        case 3:
            return content[:at] + content[at : at + n] * 2 + content[at + n :]
        case 4:
            digits = [i for i, byte in enumerate(content) if chr(byte).isdecimal()]
            at = moments.choice(digits or [at])
            return (
                content[:at] + moments.choice([b"9" * n, b"-", b"null", b'"']) + content[at + 1 :]
            )
        case _:
            return (
                content[:at] + bytes([content[at] ^ 1 << moments.randrange(8)]) + content[at + 1 :]
            )


@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_index_works_or_says_so(
    make_store: MakeStore, in_memory: Path, finished: bool
) -> None:
    """Whatever happens to the files that tell of the others, no error is a stranger's."""
    whole = make_store()
    if not finished:
        (whole / "manifest.json").unlink()
    names = ["journal/plan.json", "journal/text.jsonl", "journal/w000001.jsonl"]
    if finished:
        names = ["manifest.json", "shards.parquet", "documents.parquet", *names]
    names += ["layers/3/attn_in/zarr.json", "weights/3/W_Q/zarr.json", "zarr.json"]
    root = in_memory / "acts"
    shutil.copytree(whole, root)
    moments = random.Random(7)
    n_refused = 0
    for _ in range(N_FUZZ // 2):
        name = moments.choice(names)
        good = (root / name).read_bytes()
        (root / name).write_bytes(_damage(good, moments))
        n_refused += _use(root)
        assert (root / name).exists()
        (root / name).write_bytes(good)
    assert n_refused > N_FUZZ // 8
    assert is_complete(root) is finished
    assert verify_store(root, full=True)["damages"] == []


def _use(root: Path) -> bool:
    """Do all that does not change a store, and tell whether something was refused."""

    def read() -> None:
        store = ActivationStore.open(root)
        store.activations(attention_ports(3), [0, 21])
        store.document_names()
        store.weights("3.attention")

    def resume() -> None:
        with StoreWriter.resume(root) as writer:
            writer.missing_shards()

    refused = False
    for use in (read, resume, lambda: store_info(root), lambda: verify_store(root)):
        try:
            use()
        except StoreError:
            refused = True
    return refused
