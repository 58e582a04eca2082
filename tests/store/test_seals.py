"""Facts that a store's readers trust have checksums, which are compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lorsa.errors import StoreError
from lorsa.seal import hexadecimal
from lorsa.sites import Site
from lorsa.store.care.info import store_info
from lorsa.store.care.merge import merge_stores
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.fixed import read_documents, write_documents
from lorsa.store.folder import is_complete
from lorsa.store.journal import Journal
from lorsa.store.manifest import MANIFEST, PLAN, read_manifest
from lorsa.store.read.reader import ActivationStore
from lorsa.store.write.writer import StoreWriter
from small import (
    SMALLEST,
    add_layers,
    as_before,
    create,
    edit_manifest,
    fill,
    make_manifest,
    tokens,
    values_of,
)

MakeStore = Callable[..., Path]
MODULES = ("0.attention", "3.attention")
GEOMETRY = {"scale": 0.35355, "rope": {"inv_freq": [1.0, 0.125]}}
LAYERS: dict[int, dict[str, Any]] = {
    n: {"weights": ["W_Q"], "geometry": GEOMETRY, "self_check": {"error": float("nan")}}
    for n in (0, 3)
}


def _swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"scale": 0.35355', '"scale": 0.75355'),
        ("0.125", "0.525"),
        ('"id": "tiny"', '"id": "tinx"'),
        ('"n_documents": 2', '"n_documents": 3'),
        ('"uuid": "u"', '"uuid": "t"'),
        ('"crc32c"', '"crc32b"'),
        ("   5\n  ]", "   4\n  ]"),
    ],
    ids=["scale", "frequency", "model", "documents", "uuid", "the name of the checksum", "held"],
)
def test_a_bit_of_the_manifest_makes_no_other_number(
    make_store: MakeStore, old: str, new: str
) -> None:
    """Training began from another scale, frequency or held-out text, and ended well."""
    root = make_store(layers=LAYERS)
    path = root / MANIFEST
    text = path.read_text()
    if new == "   4\n  ]":  # the held-out shard
        old = '"held_out_shards": [\n  5\n'
        new = '"held_out_shards": [\n  4\n'
    _swap(path, old, new)
    for read in (ActivationStore.open, store_info):
        with pytest.raises(StoreError, match=r"manifest\.json (is damaged|does not describe)"):
            read(root)
    assert verify_store(root)["damages"] == [
        {"path": MANIFEST, "problem": "is damaged", "fix": "rewrite", "shard": None}
    ]
    assert verify_store(root, repair=True)["ok"]
    assert path.read_text() == text


def test_a_bit_of_the_plan_is_not_what_is_harvested_on(tmp_path: Path) -> None:
    """A harvest that went on took the plan for the facts of the store."""
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        fill(writer, [0, 1])
    _swap(root / PLAN, '"n_ctx": 6', '"n_ctx": 7')
    with pytest.raises(StoreError, match=r"plan\.json is damaged \(its checksum is wrong\)"):
        StoreWriter.resume(root)


@pytest.mark.parametrize("what", ["norm_sum", "dropped"])
def test_a_bit_of_a_journal_line_is_damage(tmp_path: Path, what: str) -> None:
    """A digit of a sum of norms became the scale of a run."""
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        fill(writer, [0, 1])
        writer._log._journal.drop([(1, "layers/0/attn_in_norm")])
    path = root / "journal/w000001.jsonl"
    text = path.read_text()
    at = text.index(what) + len(what) + 5
    while not text[at].isdigit():
        at += 1
    path.write_text(text[:at] + str(int(text[at]) ^ 1) + text[at + 1 :])
    assert Journal(root).damaged == [path]


def _rewrite(root: Path, **changes: Any) -> None:
    """Change the first row of shards.parquet, but not its checksum."""
    path = root / "shards.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0] |= changes
    made = pa.Table.from_pylist(rows, table.schema.remove_metadata())
    pq.write_table(made.replace_schema_metadata(table.schema.metadata), path)


@pytest.mark.parametrize("changes", [{"norm_sum": 9.0}, {"max_scale": 1.0}, {"n_nonfinite": 1}])
def test_another_value_in_the_table_is_damage(
    make_store: MakeStore, changes: dict[str, Any]
) -> None:
    """Sums of norms are the scales of a run; only pages had checksums."""
    root = make_store()
    _rewrite(root, **changes)
    with pytest.raises(StoreError, match=r"shards\.parquet cannot be read \(its checksum is wrong"):
        ActivationStore.open(root)
    assert verify_store(root, repair=True)["ok"]
    ActivationStore.open(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("documents.parquet", r"documents\.parquet is not the file that was written"),
        ("shards.parquet", r"shards\.parquet cannot be read \(it is another store's"),
        ("weights/3/W_Q", "W_Q/c/0/0 is not the file that was written"),
        ("manifest.json", r"shards\.parquet cannot be read \(it is another store's"),
    ],
)
def test_a_file_of_another_store_is_told(
    make_store: MakeStore, tmp_path: Path, name: str, message: str
) -> None:
    """Another store's documents.parquet passed verify --full, and the page named wrong texts."""
    root = make_store()
    other = tmp_path / "other"
    with StoreWriter.create(
        other,
        make_manifest(uuid="v"),
        tokens=tokens(),
        documents=tokens() % 2,
        document_names=["c", "d"],
        modules={m: {"W_Q": torch.full((2, 3), 5.0).bfloat16()} for m in MODULES},
        sample=values_of(make_manifest()),
    ) as writer:
        fill(writer)
        writer.finish()
    if (other / name).is_dir():
        shutil.rmtree(root / name)
        shutil.copytree(other / name, root / name)
    else:
        shutil.copy(other / name, root / name)
    with pytest.raises(StoreError, match=message):
        store = ActivationStore.open(root)
        store.document_names()
        store.weights("3.attention")
    assert not verify_store(root, full=True)["ok"]


@pytest.mark.parametrize("name", ["weights/0/W_Q", "layers/3/attn_in_channel"])
@pytest.mark.parametrize("what", ["shape", "codecs", "fill_value"])
def test_a_weight_is_read_in_the_one_form_that_is_written(
    make_store: MakeStore, name: str, what: str
) -> None:
    """Any codec, chunk and shape of a zarr.json was followed: a gzip chunk of 4 MB took 4 GB."""
    root = make_store(**SMALLEST)
    path = root / name / "zarr.json"
    facts = json.loads(path.read_text())
    if what == "shape":
        facts["shape"] = [2**12, 2**12, 2**8]
        facts["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1, 1]
    elif what == "codecs":
        facts["codecs"][1:] = [{"name": "gzip", "configuration": {"level": 5}}]
    else:
        facts["fill_value"] = 1.0
    path.write_text(json.dumps(facts, indent=2))
    store = ActivationStore.open(root)
    with pytest.raises(StoreError, match=rf"{name}/zarr.json is not"):
        store.weights("0.attention")
        store.values(Site(3, "attn_in"), [0])
    as_before(root)
    if what != "fill_value":  # which nothing reads
        with pytest.raises(StoreError, match=rf"{name}/zarr.json is not as lorsa writes it"):
            store = ActivationStore.open(root)
            store.weights("0.attention")
            store.values(Site(3, "attn_in"), [0])


def test_a_weight_of_another_size_is_not_read(make_store: MakeStore) -> None:
    """Its bytes were read, however many, before they were compared with its shape."""
    root = make_store()
    as_before(root)
    with (root / "weights/0/W_Q/c/0/0").open("r+b") as file:
        file.truncate(1 << 42)  # more than there is memory
    with pytest.raises(StoreError, match="has 4,398,046,511,104 bytes instead of 16"):
        ActivationStore.open(root).weights("0.attention")


def test_a_store_of_before_opens_and_says_that_it_has_no_checksums(make_store: MakeStore) -> None:
    root = make_store()
    as_before(root)
    assert ActivationStore.open(root).weights("3.attention")
    assert store_info(root)["has_checksums"] is False
    found = verify_store(root, full=True)
    assert (found["ok"], found["has_checksums"]) == (True, False)
    _swap(root / MANIFEST, '"id": "tiny"', '"id": "tinx"')
    with pytest.raises(StoreError, match=r"manifest\.json says another model than .*plan\.json"):
        ActivationStore.open(root)


def test_layers_added_and_removed_keep_their_checksums(make_store: MakeStore) -> None:
    root = make_store()
    with add_layers(root, [5]) as writer:
        assert verify_store(root)["damages"] == []
        fill(writer)
        writer.finish()
    assert verify_store(root, full=True)["ok"]
    known = read_manifest(root / MANIFEST).checksums
    assert {"weights/5/W_Q/c/0/0", "weights/0/W_Q/c/0/0", "documents.parquet"} <= known.keys()
    remove_sites(root, "0")
    assert verify_store(root, full=True)["ok"]
    assert not [n for n in read_manifest(root / MANIFEST).checksums if n.startswith("weights/0/")]
    assert store_info(root)["has_checksums"] is True


def test_a_merged_store_has_checksums_of_its_own(make_store: MakeStore, tmp_path: Path) -> None:
    root = make_store()
    other = tmp_path / "b"
    with StoreWriter.create(
        other,
        make_manifest(uuid="v"),
        tokens=tokens() + 1000,
        documents=tokens() % 2,
        document_names=["c", "d"],
        modules={m: {"W_Q": torch.arange(6).view(2, 3).bfloat16()} for m in MODULES},
        sample=values_of(make_manifest()),
    ) as writer:
        fill(writer)
        writer.finish()
    merge_stores([root, other], tmp_path / "all")
    assert merge_stores([root, other], tmp_path / "all")["n_seq"] == 44
    assert verify_store(tmp_path / "all", full=True)["ok"]
    assert is_complete(tmp_path / "all")


def test_a_table_has_no_more_rows_than_are_known(make_store: MakeStore) -> None:
    """A small file may stand for billions of rows, all of which were decoded."""
    root = make_store()
    checksum = write_documents(root, ["a"] * 3_000_000)
    edit_manifest(root, checksums=read_manifest(root / MANIFEST).checksums | checksum)
    manifest = read_manifest(root / MANIFEST)
    assert manifest.checksums["documents.parquet"] != hexadecimal(0)
    with pytest.raises(StoreError, match="it has 3,000,000 rows, and may have 2"):
        read_documents(root, manifest)
