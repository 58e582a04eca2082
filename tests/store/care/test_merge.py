"""One store of several: every sequence once, to the bit, and what was held out stays held out."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
import zarr
from lorsa.errors import StoreError
from lorsa.harvest.corpus.packing import fingerprint
from lorsa.sites import Site, attention_ports
from lorsa.store import open_files
from lorsa.store.care.merge import merge_stores
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.fixed import write_array
from lorsa.store.manifest import MANIFEST, read_manifest
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.rows import OpenShard
from lorsa.store.write.writer import StoreWriter
from power import PowerCutError, power_cut
from small import (
    LAYERS,
    N_CTX,
    SMALLEST,
    digests,
    edit_manifest,
    make_manifest,
    pair,
    weights_of,
)

MakeOther = Callable[..., Path]


SAMPLE = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])


def _token_rows(n_seq: int, first: int) -> torch.Tensor:
    return torch.arange(n_seq * N_CTX, dtype=torch.int32).view(n_seq, N_CTX) + first


@pytest.fixture
def make_text(tmp_path: Path) -> MakeOther:
    """Write a store whose token ids begin at a number and whose activations follow from them."""

    def make(
        name: str,
        n_seq: int,
        first: int,
        shard_seqs: int = 4,
        sample: torch.Tensor = SAMPLE,
        nan_in: int | None = None,
        **changes: Any,
    ) -> Path:
        manifest = make_manifest(n_seq=n_seq, shard_seqs=shard_seqs, **changes)
        ids = _token_rows(n_seq, first)
        with StoreWriter.create(
            tmp_path / name,
            manifest,
            tokens=ids,
            documents=torch.arange(n_seq, dtype=torch.int32)[:, None].expand(-1, N_CTX) % 2,
            document_names=[f"{name}0", f"{name}1"],
            modules=weights_of(manifest),
            sample={site: sample * (1 + 2 * site.place[1]) for site in manifest.sites},
        ) as writer:
            for shard in writer.missing_shards():
                rows = manifest.shard_rows(shard)
                with writer.shard(shard, keep_nonfinite=nan_in is not None) as session:
                    for seq in rows:
                        batch = {}
                        for layer in LAYERS:
                            batch |= pair(layer, *_values(layer, ids[seq : seq + 1]))
                        if seq == nan_in:
                            batch[Site(3, "attn_in")][0, 1, 2] = torch.nan
                        session.append(batch)
            writer.finish()
        return tmp_path / name

    return make


def _values(layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and y that only these token ids have."""
    wide = ids[..., None] + torch.arange(5) / 8 + layer  # [n, n_ctx, 5]
    return wide.sin(), wide.cos() * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compression", ["none", "lz4"])
@pytest.mark.parametrize(("n_b", "shard_b"), [(22, 4), (9, 2), (7, 3), (40, 16)])
def test_a_merged_store_has_every_sequence_of_both(
    make_text: MakeOther, tmp_path: Path, n_b: int, shard_b: int, dtype: str, compression: str
) -> None:
    facts = {"dtype": dtype, "compression": compression}
    a = make_text("a", 22, 0, **facts)
    b = make_text("b", n_b, 1000, shard_b, **facts)
    seen: list[Any] = []
    result = merge_stores([a, b], tmp_path / "c", report=seen.append)
    assert (result["n_seq"], seen[-1].n_bytes) == (22 + n_b, seen[-1].total_bytes)
    assert verify_store(tmp_path / "c", full=True)["ok"]
    c, parts = ActivationStore.open(tmp_path / "c"), [ActivationStore.open(root) for root in (a, b)]
    ids = c.tokens(range(22 + n_b))
    both = torch.cat([_token_rows(22, 0), _token_rows(n_b, 1000)])
    assert torch.equal(ids[ids[:, 0].argsort()], both)
    for layer in LAYERS:
        x, y = (part.to(getattr(torch, dtype)) for part in _values(layer, ids))
        found = c.activations(attention_ports(layer), range(22 + n_b))
        assert torch.equal(found.x, x)
        assert torch.equal(found.y, y)
        for site in attention_ports(layer).sites:
            norm = float(c.norms(site, c.train_seqs).double().mean())
            assert c.mean_norm(site) == pytest.approx(norm, rel=1e-6)
        assert torch.equal(
            c.weights(f"{layer}.attention")["W_Q"], parts[0].weights(f"{layer}.attention")["W_Q"]
        )
    held_out = torch.cat([part.tokens(part.held_out_seqs)[:, 0] for part in parts])
    kept = c.tokens(c.held_out_seqs)[:, 0]
    assert set(held_out.tolist()) <= set(kept.tolist())
    assert len(kept) <= 2 * len(held_out)
    assert len(c.train_seqs) > 0


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("outputs", ["store", "derive"])
def test_a_merged_store_says_of_itself_what_a_harvest_would(
    make_text: MakeOther, tmp_path: Path, outputs: str, dtype: str
) -> None:
    """Sums, scales and the tokens that are not finite are those of one store of the same text."""
    facts = {"dtype": dtype, "outputs": outputs}
    a = make_text("a", 8, 0, nan_in=2, **facts)
    b = make_text("b", 4, 8 * N_CTX, **facts)
    merge_stores([a, b], tmp_path / "c")
    assert verify_store(tmp_path / "c", full=True)["ok"]
    c, whole = (
        ActivationStore.open(tmp_path / "c"),
        ActivationStore.open(make_text("whole", 12, 0, nan_in=2, **facts)),
    )
    order = c.tokens(range(12))[:, 0].argsort().numpy()  # what was held out comes last
    for site in c.sites:
        assert c.n_nonfinite(site) == whole.n_nonfinite(site) == int(site == (3, "attn_in"))
        norms = c.norms(site, order), whole.norms(site, range(12))
        assert torch.equal(*(each.nan_to_num() for each in norms))
        assert (c.scales(site) or ()) == pytest.approx(whole.scales(site) or ())
    for layer in LAYERS:
        ports = attention_ports(layer)
        mine, theirs = c.stored(ports, order), whole.stored(ports, range(12))
        assert (len(mine.parts), len(mine.known)) == ((1, 1) if outputs == "derive" else (2, 0))
        for part, same in zip(mine.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(part.nan_to_num(), same.nan_to_num())
    totals = [
        {
            array: sum(e.square_sum for e in store.entries if e.array == array)
            for array in {e.array for e in store.entries}
        }
        for store in (c, whole)
    ]
    assert totals[0] == pytest.approx(totals[1])
    assert c.mean_norm(Site(0, "attn_out")) > 0


def test_int8_with_other_scales_of_the_channels_is_refused(
    make_text: MakeOther, tmp_path: Path
) -> None:
    roots = [
        make_text("a", 8, 0, **SMALLEST),
        make_text("b", 8, 900, sample=2 * SAMPLE, **SMALLEST),
    ]
    with pytest.raises(StoreError, match="merged: layers/0/attn_in_channel differs.* as bfloat16"):
        merge_stores(roots, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_documents_keep_their_names_and_the_rest_is_told(
    make_text: MakeOther, tmp_path: Path
) -> None:
    roots = [make_text("a", 22, 0), make_text("b", 9, 1000), make_text("c", 6, 2000)]
    merge_stores(roots, tmp_path / "all")
    store = ActivationStore.open(tmp_path / "all")
    assert store.document_names() == ["a0", "a1", "b0", "b1", "c0", "c1"]
    ids = store.tokens(range(37))[:, 0]
    documents = store.documents(range(37))[:, 0]
    for first, name in ((0, 0), (1000, 2), (2000, 4)):
        mine = (ids >= first) & (ids < first + 1000)
        assert torch.equal(documents[mine], (ids[mine] - first) // N_CTX % 2 + name)
    corpus = store.manifest.corpus
    assert corpus["n_documents"] == 6
    assert corpus["tokens_sha256"] == fingerprint(store.tokens(range(37)))
    assert store.manifest.uuid != ActivationStore.open(roots[0]).manifest.uuid
    assert zarr.open_group(tmp_path / "all", mode="r")["layers/3/attn_in"].shape == (37, 6, 5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"id": "huge", "revision": None}}, "model id is 'tiny' and 'huge'"),
        ({"model": {"id": "tiny", "revision": "7"}}, "model revision is None and '7'"),
        ({"dtype": "float16"}, "dtype is 'float32' and 'float16'"),
        (
            {"outputs": "derive"},
            "origin of 0.attn_out is 'stored' and 'derived from 0.attn_in by 0.attention'",
        ),
        ({"compression": "lz4"}, "compression is 'none' and 'lz4'"),
        ({"tokenizer": {"sha": 1}}, "tokenizer is {} and {'sha': 1}"),
        (
            {"corpus": {"data": "none", "n_documents": 2, "bos": True}},
            "corpus bos is None and True",
        ),
        (
            {"layers": {n: {"weights": ["W_Q"], "geometry": {"scale": n}} for n in LAYERS}},
            "the geometry of 0.attention differs",
        ),
    ],
)
def test_stores_that_do_not_fit_are_refused_by_the_field(
    make_text: MakeOther, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    roots = [make_text("a", 22, 0), make_text("b", 9, 1000, **changes)]
    with pytest.raises(StoreError, match=f"cannot be merged: {message}"):
        merge_stores(roots, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_other_layers_and_lengths_are_refused(
    make_text: MakeOther, make_store: MakeOther, tmp_path: Path
) -> None:
    a = make_text("a", 22, 0)
    b = make_store("b", layers={0: {"weights": ["W_Q"]}})
    with pytest.raises(StoreError, match="sites is 'layers 0,3' and 'layer 0'"):
        merge_stores([a, b], tmp_path / "c")
    with pytest.raises(StoreError, match="two stores or more; 1 given"):
        merge_stores([a], tmp_path / "c")


def test_another_model_under_the_same_name_is_refused(make_text: MakeOther, tmp_path: Path) -> None:
    roots = [make_text("a", 22, 0), make_text("b", 9, 1000)]
    changed = write_array(roots[1], "weights/3/W_Q", torch.full((2, 3), 7.0).bfloat16())
    edit_manifest(roots[1], checksums=read_manifest(roots[1] / MANIFEST).checksums | changed)
    with pytest.raises(StoreError, match="a weight of 3.attention differs"):
        merge_stores(roots, tmp_path / "c")


@pytest.mark.parametrize("first", [0, 5 * N_CTX])
def test_stores_that_share_sequences_are_refused(
    make_text: MakeOther, tmp_path: Path, first: int
) -> None:
    roots = [make_text("a", 22, 0), make_text("b", 9, first)]
    with pytest.raises(StoreError, match=r"share 9 sequences, such as \d+ of .*a and \d+ of .*b"):
        merge_stores(roots, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_is_in_the_way_is_left_alone(make_text: MakeOther, tmp_path: Path) -> None:
    a, b, c = make_text("a", 22, 0), make_text("b", 9, 1000), make_text("c", 6, 2000)
    with pytest.raises(StoreError, match="holds another store"):
        merge_stores([a, b], c)
    with pytest.raises(StoreError, match="holds another store"):
        merge_stores([a, b], a)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").touch()
    with pytest.raises(StoreError, match="other things in it"):
        merge_stores([a, b], tmp_path / "notes")
    with pytest.raises(StoreError, match="does not exist"):
        merge_stores([a, tmp_path / "nowhere"], tmp_path / "d")


def test_a_merge_that_does_not_fit_the_disk_is_not_begun(
    make_text: MakeOther, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [make_text("a", 22, 0), make_text("b", 9, 1000)]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="bytes and 1,000 are free"):
        merge_stores(roots, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_merge_that_is_cut_short_goes_on(make_text: MakeOther, tmp_path: Path) -> None:
    """The power goes at some changes of the disk, then the same command again."""
    roots = [make_text("a", 10, 0), make_text("b", 9, 1000, 2)]
    merge_stores(roots, tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    n_unfinished = 0
    for at in (1, 5, 60, 150, 250, 280, 310, 340, 370, 400):
        out = tmp_path / f"cut{at}"
        with pytest.raises(PowerCutError), power_cut(at):
            merge_stores(roots, out)
        if (out / "journal/plan.json").exists() and not (out / "manifest.json").exists():
            n_unfinished += 1
            assert verify_store(out, full=True)["next"].startswith("lorsa store merge ")
        merge_stores(roots, out)
        assert digests(out) == expected
        assert verify_store(out, full=True)["ok"]
    assert n_unfinished >= 4
    assert merge_stores(roots, tmp_path / "whole")["n_seq"] == 19  # nothing left to do


@pytest.mark.parametrize("absolute", [True, False])
def test_the_merge_that_is_shown_goes_on(
    make_text: MakeOther, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    """It was "holds another store" without some layers, by other paths, from another folder."""
    make_text("a", 22, 0)
    make_text("b", 9, 1000)
    monkeypatch.chdir(tmp_path)
    merge_stores(["a", "b"], "m")
    remove_sites("m", "3")
    before = digests(tmp_path / "m")
    lost = Path("m/layers/0/attn_out/c/1/0/0")
    lost.unlink()
    with pytest.raises(StoreError) as raised:
        ActivationStore.open("m")
    found = verify_store("m", repair=True)["next"]
    assert f"lorsa store verify m --repair, then {found} writes it again" in str(raised.value)
    *_, one, other, _, out = shlex.split(found)
    out = tmp_path / out
    if absolute:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    else:
        one, other = "./a", "b"
    assert merge_stores([one, other], out)["layers"] == [0]
    assert digests(out) == before
    assert verify_store(out, full=True)["ok"]


def test_a_merge_has_few_files_open(
    make_text: MakeOther, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every array of every store kept its own open, more than a process may have."""
    roots = [make_text("a", 22, 0), make_text("b", 9, 1000)]
    monkeypatch.setattr(open_files, "OPEN_FILES", 2)
    there: WeakSet[OpenShard] = WeakSet()
    n_open: list[int] = []
    real = OpenShard.__init__

    def counted(self: OpenShard, *args: Any) -> None:
        real(self, *args)
        there.add(self)
        n_open.append(len(there))

    monkeypatch.setattr(OpenShard, "__init__", counted)
    merge_stores(roots, tmp_path / "c")
    assert len(n_open) > 60
    assert max(n_open) <= 5  # of both stores and of the new one, and the next


def test_a_damaged_source_stops_the_merge(make_text: MakeOther, tmp_path: Path) -> None:
    roots = [make_text("a", 22, 0), make_text("b", 9, 1000)]
    path = roots[1] / "layers/3/attn_out/c/1/0/0"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=f"{path} is damaged.*lorsa store verify"):
        merge_stores(roots, tmp_path / "c")
