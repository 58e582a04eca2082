"""Values to bytes and back: what int8 may lose, and what it says of outliers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import zarr
from lorsa.sites import Site, attention_ports
from lorsa.store.encoding import channel_scale, encode
from lorsa.store.read.reader import ActivationStore
from lorsa.store.write.encode import encode_sites
from small import LAYERS, N_SEQ, create, fill, make_manifest, pair, values


def _activations() -> torch.Tensor:
    """Return activations with a channel fifty times larger than the rest."""
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 50
    return x


def test_int8_is_off_by_half_a_step_at_most() -> None:
    x = _activations()
    channel = channel_scale(x)
    found = encode(x, "int8", channel)
    assert found.values.dtype == torch.int8
    assert found.scale is not None
    assert found.scale.shape == (4, 6)
    step = found.scale[..., None] * channel
    assert ((found.decode() - x).abs() <= step / 2 * (1 + 1e-5)).all()
    assert found.decode().dtype == torch.float32


def test_channel_scales_spare_the_rest_an_outlier_channel() -> None:
    """With a scale per token alone, all channels were rounded to what the largest needs."""
    x = _activations()
    errors = [
        (encode(x, "int8", channel).decode() - x)[..., :7].norm() / x[..., :7].norm()
        for channel in (channel_scale(x), torch.ones(32))
    ]
    assert errors[0] < 0.01 < errors[1]


def test_a_token_with_a_huge_outlier_costs_itself_alone() -> None:
    x = _activations()
    plain = encode(x, "int8", channel_scale(x)).decode()
    x[1, 2, 3] = 1e6
    found = encode(x, "int8", channel_scale(_activations()))
    rest = torch.ones(4, 6, dtype=torch.bool)
    rest[1, 2] = False
    assert torch.equal(found.decode()[rest], plain[rest])
    assert found.decode()[1, 2, 3] == pytest.approx(1e6, rel=1e-6)


def test_zeros_stay_zeros() -> None:
    assert channel_scale(torch.zeros(2, 3, 5)).tolist() == [1] * 5
    assert not encode(torch.zeros(2, 3, 5), "int8", torch.ones(5)).decode().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_stays_so(bad: float) -> None:
    x = _activations()
    x[0, 1, 2] = bad
    decoded = encode(x, "int8", torch.ones(32)).decode()
    assert not decoded[0, 1].isfinite().any()
    assert decoded.isfinite().sum() == decoded.numel() - 32


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_an_int8_store_comes_back(make_store: Callable[..., Path], compression: str) -> None:
    store = ActivationStore.open(make_store(dtype="int8", compression=compression))
    seqs = [21, 0, 7, 7]
    for layer in LAYERS:
        for site, found in enumerate(store.activations(attention_ports(layer), seqs)):
            whole = values(layer, site)
            assert torch.equal(found, encode(whole, "int8", channel_scale(whole)).decode()[seqs])
            assert (found - whole[seqs]).norm() / whole.norm() < 0.01
    assert torch.allclose(
        store.norms(Site(3, "attn_out"), range(N_SEQ)), values(3, 1).norm(dim=-1), rtol=0.01
    )


def test_plain_zarr_reads_int8(make_store: Callable[..., Path]) -> None:
    root = make_store(dtype="int8")
    layer: Any = zarr.open_group(root, mode="r")["layers/3"]
    by_zarr = layer["attn_in"][:] * layer["attn_in_scale"][:][..., None]
    by_zarr = by_zarr * layer["attn_in_channel"][:]
    assert np.allclose(
        by_zarr, ActivationStore.open(root).values(Site(3, "attn_in"), range(N_SEQ)).numpy()
    )
    assert layer["attn_in"].attrs["lorsa_dtype"] == "int8"


def test_scales_tell_of_outliers(tmp_path: Path) -> None:
    manifest = make_manifest(dtype="int8")
    with create(tmp_path / "acts", manifest) as writer:
        fill(writer, [0, 1, 3, 4, 5])
        x = values(3, 0)[8:12].clone()
        x[1, 2, 3] = 1e4
        with writer.shard(2) as session:
            session.append(dict.fromkeys(manifest.sites, x))
        writer.finish()
    store, site = ActivationStore.open(tmp_path / "acts"), Site(3, "attn_in")
    scales = store.scales(site)
    assert scales is not None
    mean, largest = scales
    assert largest == pytest.approx(float((x / channel_scale(values(3, 0))).abs().max()) / 127)
    assert largest > 100 * mean / 2
    assert store.n_nonfinite(site) == 0


def test_other_dtypes_have_no_scales(make_store: Callable[..., Path]) -> None:
    root = make_store()
    assert ActivationStore.open(root).scales(Site(3, "attn_in")) is None
    assert sorted(p.name for p in (root / "layers/3").iterdir() if p.is_dir()) == [
        "attn_in",
        "attn_in_norm",
        "attn_out",
        "attn_out_norm",
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_channel_scales_are_of_what_is_finite(bad: float) -> None:
    """An Inf in the sample made every token NaN in its channel; a NaN made its scale 1."""
    x = _activations()
    x[0, 1, 2] = 0
    expected = channel_scale(x)
    x[0, 1, 2] = bad
    assert torch.equal(channel_scale(x), expected)
    assert torch.equal(channel_scale(torch.full((2, 3, 5), bad)), torch.ones(5))


@pytest.mark.parametrize("quiet", [0.0, 1e-7])
def test_a_channel_quiet_in_the_sample_may_wake_up(quiet: float) -> None:
    """Its scale was so small that the token's others were all rounded to 0, silently."""
    x = _activations()
    sample = x.clone()
    sample[..., 3] *= quiet
    found = encode(x, "int8", channel_scale(sample)).decode()
    rest = torch.arange(32) != 7  # the loud one would hide them
    assert (found - x)[..., rest].norm() / x[..., rest].norm() < 0.3


class _OnGpu(torch.Tensor):
    """Says that it is on a GPU, and hands out copies that have not arrived."""

    is_cuda = True

    def to(self, *args: Any, non_blocking: bool = False, **named: Any) -> torch.Tensor:
        moved: torch.Tensor = super().to(*args, **named)
        return moved.as_subclass(_UnderWay) if non_blocking else moved


class _UnderWay(torch.Tensor):
    def contiguous(self, *_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("read before it arrived")


def test_a_copy_that_is_under_way_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in another order of memory were put in order on the host, before they had arrived."""
    monkeypatch.setattr(torch.cuda, "Event", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", MagicMock())
    monkeypatch.setattr(torch.Tensor, "record_stream", MagicMock())
    x = values(0, 0).mT.contiguous().mT.as_subclass(_OnGpu)
    assert not x.is_contiguous()
    encoded = encode_sites(make_manifest(), pair(0, x, x), {})
    assert {type(part) for part in encoded.arrays.values()} == {_UnderWay}
    assert all(part.is_contiguous() for part in encoded.arrays.values())
