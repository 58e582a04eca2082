"""Reading: what was written, or an error that says which file and what to do."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from lorsa.errors import StoreError
from lorsa.sites import Site, attention_ports
from lorsa.store.care.repair import verify_store
from lorsa.store.read.reader import ActivationStore
from small import LAYERS, N_CTX, N_SEQ, create, edit_manifest, fill, make_manifest, tokens, values


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_activations_come_back(
    make_store: Callable[..., Path], dtype: str, compression: str
) -> None:
    store = ActivationStore.open(make_store(dtype=dtype, compression=compression))
    seqs = [21, 0, 7, 7]
    for layer in LAYERS:
        x, y = store.activations(attention_ports(layer), seqs)
        assert x.dtype == getattr(torch, dtype)
        assert torch.equal(x, values(layer, 0)[seqs].to(x.dtype))
        assert torch.equal(y, values(layer, 1)[seqs].to(x.dtype))


def test_tokens_documents_norms_and_weights_come_back(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store())
    assert torch.equal(store.tokens([3, 1]), tokens()[[3, 1]])
    assert torch.equal(store.documents([3]), tokens()[[3]] % 2)
    assert store.document_names() == ["a", "b"]
    norms = store.norms(Site(3, "attn_out"), range(N_SEQ))
    assert torch.allclose(norms, values(3, 1).norm(dim=-1))
    assert store.weights("0.attention")["W_Q"].dtype == torch.bfloat16
    train = store.train_seqs
    assert store.mean_norm(Site(3, "attn_in")) == pytest.approx(
        float(values(3, 0)[train].norm(dim=-1).mean()), rel=1e-6
    )


def test_train_and_held_out_are_disjoint_and_everything(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store())
    assert store.held_out_seqs.tolist() == [20, 21]
    assert store.train_seqs.tolist() == list(range(20))


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_plain_zarr_reads_the_same(make_store: Callable[..., Path], compression: str) -> None:
    root = make_store(dtype="bfloat16", compression=compression)
    array: Any = zarr.open_group(root, mode="r")["layers/3/attn_in"]
    bits = np.asarray(array[:])
    assert array.attrs["lorsa_dtype"] == "bfloat16"
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), values(3, 0).bfloat16())
    token_array: Any = zarr.open_group(root, mode="r")["tokens"]
    assert np.array_equal(np.asarray(token_array[:]), tokens().numpy())


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized")
def test_plain_zarr_lists_the_store(make_store: Callable[..., Path]) -> None:
    group = zarr.open_group(make_store(), mode="r")
    shapes = {name: a.shape for name, a in group.members(max_depth=None) if hasattr(a, "shape")}
    assert shapes == {
        "tokens": (N_SEQ, N_CTX),
        "documents": (N_SEQ, N_CTX),
        **{f"layers/{n}/{site}": (22, 6, 5) for n in LAYERS for site in ("attn_in", "attn_out")},
        **{f"layers/{n}/{s}_norm": (22, 6) for n in LAYERS for s in ("attn_in", "attn_out")},
        **{f"weights/{n}/W_Q": (2, 3) for n in LAYERS},
    }


def test_plain_zarr_written_bytes_are_ours(make_store: Callable[..., Path], tmp_path: Path) -> None:
    """Our shard files are, bit for bit, what zarr-python would have written."""
    root = make_store()
    theirs = tmp_path / "theirs"
    shutil.copytree(root, theirs)
    shutil.rmtree(theirs / "layers/0/attn_in/c")
    array: Any = zarr.open_group(theirs, mode="a")["layers/0/attn_in"]
    for first in range(0, N_SEQ, 4):
        array[first : first + 4] = values(0, 0)[first : first + 4].numpy()
    for path in sorted((root / "layers/0/attn_in/c").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (theirs / path.relative_to(root)).read_bytes()


def test_shards_table_has_a_row_per_file(make_store: Callable[..., Path]) -> None:
    root = make_store()
    rows = pq.read_table(root / "shards.parquet").to_pylist()
    assert len(rows) == 6 * (2 + 2 * 4)
    row = next(r for r in rows if r["array"] == "layers/3/attn_out_norm" and r["shard"] == 5)
    assert row["n_seq"] == 2
    assert row["norm_sum"] == pytest.approx(float(values(3, 1)[20:].norm(dim=-1).sum()), rel=1e-6)


def test_memory_is_not_shared_between_reads(make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store())
    first = store.activations(attention_ports(0), [1]).x
    first.zero_()
    assert store.activations(attention_ports(0), [1]).x.any()


def test_a_folder_that_is_no_store_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="lorsa harvest --model MODEL"):
        ActivationStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is no activation store"):
        ActivationStore.open(tmp_path)


def test_an_unfinished_store_says_how_to_go_on(tmp_path: Path) -> None:
    writer = create(tmp_path / "acts", make_manifest())
    fill(writer, [0])
    with pytest.raises(StoreError, match="unfinished: run the same lorsa harvest command"):
        ActivationStore.open(tmp_path / "acts")


def test_another_format_version_is_refused(make_store: Callable[..., Path]) -> None:
    root = make_store()
    edit_manifest(root, format_version=3)
    with pytest.raises(StoreError, match="format version 3; this version of lorsa reads 1 and"):
        ActivationStore.open(root)


def _derived(source: str, module: str) -> dict[str, Any]:
    return {"width": 5, "derived": {"from": [source], "by": module}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_seq": "many"}, "n_seq is 'many'"),
        ({"sites": []}, "does not describe a store"),
        ({"sites": {"0.attn_in": {"width": 5}}}, "'derived'"),
        ({"modules": {"0.attention": {"weights": ["../../x"]}}}, "0.attention has weights"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"held_out_shards": [6]}, "held_out_shards"),
        ({"colour": 1}, "colour"),
        ({"n_seq": 40}, r"says \[22, 6\] int32; the manifest says \[40, 6\]"),
        (
            {"sites": {"0.attn_in": {"width": 7, "derived": None}}},
            r"attn_in/zarr.json says \[22, 6, 5\] float32; the manifest says",
        ),
        ({"n_seq": 10**12}, "n_seq is 1000000000000"),
        ({"sites": {"../x": {"width": 5, "derived": None}}}, "'../x' is no site"),
        ({"sites": {"-1.attn_in": {"width": 5, "derived": None}}}, "'-1.attn_in' is no site"),
        ({"sites": {"0.attn_in": {"width": 0, "derived": None}}}, "width of 0.attn_in is 0"),
        ({"sites": {"0.attn_in": {"width": 5, "derived": None, "norms": 1}}}, "0.attn_in is {"),
        ({"sites": {"0.mlp_in": {"width": 5, "derived": None, "norms": "pair"}}}, "in no pair"),
        ({"sites": {"0.mlp_in": _derived("0.attn_in", "0.mlp")}}, "0.mlp, which is not there"),
        ({"sites": {"0.attn_out": _derived("0.attn_out", "0.attention")}}, "which is not stored"),
        ({"modules": {"../x": {"weights": []}}}, "'../x' is no module"),
        ({"modules": {"0.attention": {"weights": "W_Q"}}}, "0.attention has weights 'W_Q'"),
        ({"modules": {"0.attention": {"weights": ["mlp"]}}}, "0.attention has weights"),
        ({"model": "tiny"}, "model is 'tiny'; it must be a table"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    make_store: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    root = make_store()
    edit_manifest(root, **changes)
    with pytest.raises(StoreError, match=message):
        ActivationStore.open(root)


def test_a_cut_file_is_found_when_the_store_is_opened(make_store: Callable[..., Path]) -> None:
    root = make_store()
    path = root / "layers/3/attn_out/c/2/0/0"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        StoreError, match=r"attn_out/c/2/0/0 has \d+ bytes instead of \d+; the same"
    ):
        ActivationStore.open(root)


def test_a_missing_file_is_found_when_the_store_is_opened(make_store: Callable[..., Path]) -> None:
    root = make_store()
    (root / "tokens/c/0/0").unlink()
    with pytest.raises(StoreError, match="tokens/c/0/0 is missing; delete the store and harvest"):
        ActivationStore.open(root)


def test_a_flipped_bit_is_found_when_it_is_read(make_store: Callable[..., Path]) -> None:
    root = make_store()
    path = root / "layers/3/attn_in/c/0/0/0"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    store = ActivationStore.open(root)
    store.activations(attention_ports(3), [1])
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        store.activations(attention_ports(3), [0])


def test_a_damaged_table_is_named(make_store: Callable[..., Path]) -> None:
    root = make_store()
    (root / "shards.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(StoreError, match="shards.parquet cannot be read"):
        ActivationStore.open(root)


def test_missing_weights_are_not_zeros(make_store: Callable[..., Path]) -> None:
    """zarr would read a missing chunk as zeros."""
    root = make_store()
    shutil.rmtree(root / "weights/0/W_Q/c")
    with pytest.raises(StoreError, match="W_Q/c/0/0 is missing"):
        ActivationStore.open(root).weights("0.attention")


def test_a_weight_that_is_gone_is_not_a_weight_that_never_was(
    make_store: Callable[..., Path],
) -> None:
    """A missing bias was once read as a layer without one."""
    root = make_store()
    shutil.rmtree(root / "weights/3/W_Q")
    with pytest.raises(StoreError, match="weights/3/W_Q cannot be read"):
        ActivationStore.open(root).weights("3.attention")


def test_any_file_cut_short_is_found(make_store: Callable[..., Path]) -> None:
    """Every file in turn, cut to half: a read raises, or `verify` names it if no read needs it."""
    root = make_store()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name.startswith("journal/"):
            continue  # of a finished store, it repeats shards.parquet
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        if name == "zarr.json" or (name.count("/") < 3 and name.endswith("/zarr.json")):
            assert [damage["path"] for damage in verify_store(root)["damages"]] == [name]
        else:
            with pytest.raises(StoreError):
                _read_everything(root)
        path.write_bytes(whole)
    _read_everything(root)


def _read_everything(root: Path) -> None:
    store = ActivationStore.open(root)
    store.document_names()
    for layer in LAYERS:
        store.activations(attention_ports(layer), range(N_SEQ))
        store.weights(f"{layer}.attention")


def test_a_layer_that_is_not_stored_is_named(make_store: Callable[..., Path]) -> None:
    with pytest.raises(StoreError, match="layer 7 is not in .*; it has layers 0,3"):
        ActivationStore.open(make_store()).activations(attention_ports(7), [0])


def test_a_sequence_out_of_range_is_an_error(make_store: Callable[..., Path]) -> None:
    with pytest.raises(IndexError, match="sequence 22; the store has 0..21"):
        ActivationStore.open(make_store()).tokens([N_SEQ])
    assert ActivationStore.open(make_store("b")).manifest.n_ctx == N_CTX
