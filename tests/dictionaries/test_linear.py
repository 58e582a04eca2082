"""SAEs and transcoders against their definitions in dense torch, in units and on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lorsa.dictionaries.kinds import load
from lorsa.dictionaries.linear import WRITE_SIZE, LinearDictionary
from lorsa.dictionaries.linear_config import SaeConfig, TranscoderConfig
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.sae import Sae
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.errors import CheckpointError
from lorsa.kernels.reference import select_top_k
from lorsa.sites import Site
from torch import Tensor

SHAPE: dict[str, Any] = {"d_model": 8, "n_features": 24, "top_k": 5, "layer": 3}
NAMES = ["sae", "transcoder", "skip"]


def _filled(dictionary: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.normal_()
        if dictionary.threshold is not None:
            dictionary.threshold.fill_(2.0)
    return dictionary


def _make(name: str, **changes: Any) -> LinearDictionary:
    """Return a dictionary of random weights."""
    settings = SHAPE | changes
    if name == "sae":
        return _filled(Sae(SaeConfig(site="resid_out", **settings)))
    return _filled(Transcoder(TranscoderConfig(skip=name == "skip", **settings)))


def _dense(dictionary: LinearDictionary, x: Tensor, sizes: tuple[int, ...] = (24,)) -> Tensor:
    """Return y_hat of each prefix by the definition, [n_prefixes, batch, seq, d_model]."""
    d: Any = dictionary
    z_pre = (x - d.b_O if isinstance(d, Sae) else x) @ d.W_E.T + d.b_E
    acts, ids = select_top_k(z_pre, d.W_O.norm(dim=1), top_k=5, select=d.config.select)
    z = torch.zeros_like(z_pre).scatter(-1, ids.long(), acts)
    beside = d.b_O if getattr(d, "W_skip", None) is None else x @ d.W_skip.T + d.b_O
    return torch.stack([z[..., :size] @ d.W_O[:size] + beside for size in sizes])


@pytest.mark.parametrize("select", ["relu", "abs"])
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients_are_those_of_the_definition(name: str, select: str) -> None:
    dictionary = _make(name, select=select).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    weight = torch.randn(2, 7, 8, dtype=torch.float64)
    found, expected = dictionary(x), _dense(dictionary, x)[0]
    torch.testing.assert_close(found, expected)
    parameters = list(dictionary.parameters())
    ours = torch.autograd.grad((found * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_each_prefix_is_decoded_as_if_alone(name: str) -> None:
    dictionary = _make(name, prefixes=(0.125, 0.5, 1.0)).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    acts, ids = dictionary.encode(x)
    found = dictionary.decode_prefixes(acts, ids, x)
    torch.testing.assert_close(found, _dense(dictionary, x, (3, 12, 24)))
    torch.testing.assert_close(found[-1], dictionary.decode(acts, ids, x))
    parameters = list(dictionary.parameters())
    y = torch.randn(2, 7, 8, dtype=torch.float64)
    ours = torch.autograd.grad((found - y).square().mean(), parameters)
    dense = _dense(dictionary, x, (3, 12, 24))
    theirs = torch.autograd.grad((dense - y).square().mean(), parameters)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("name", NAMES)
def test_units_change_by_powers_of_two_to_the_bit(name: str, activation: str) -> None:
    dictionary = _make(name, activation=activation)
    x = torch.randn(2, 7, 8)
    y = dictionary(x)
    before = {n: t.clone() for n, t in dictionary.state_dict().items()}
    y_scale = 4.0 if name == "sae" else 0.5
    assert torch.equal(dictionary.rescale_(4.0, y_scale)(4.0 * x), y_scale * y)
    dictionary.rescale_(0.25, 1 / y_scale)
    assert all(torch.equal(t, before[n]) for n, t in dictionary.state_dict().items())


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_balanced_and_what_is_written_stays(
    name: str, activation: str, by_norm: bool
) -> None:
    dictionary = _make(name, activation=activation, score_by_norm=by_norm)
    with torch.no_grad():
        dictionary.W_O.mul_(0.01)
    if dictionary.threshold is not None and by_norm:
        dictionary.threshold.mul_(0.01)
    x = torch.randn(2, 6, 8)
    before = dictionary(x)
    assert before.abs().max() > 0
    dictionary.balance_()
    assert torch.equal(dictionary(x), before)
    writes, reads = (w.norm(dim=1).mean() for w in (dictionary.W_O, dictionary.W_E))
    assert WRITE_SIZE / 2 <= (writes / reads).item() <= WRITE_SIZE * 2


def test_rows_of_nothing_are_left_as_they_are() -> None:
    dictionary = Sae(SaeConfig(site="resid_out", **SHAPE))
    with torch.no_grad():
        dictionary.W_O.zero_()
        dictionary.W_E.fill_(2.0)
    assert torch.equal(dictionary.balance_().W_E, torch.full_like(dictionary.W_E, 2.0))


def test_an_sae_has_one_unit() -> None:
    with pytest.raises(ValueError, match=r"the scales are 2\.0 and 1\.0; an SAE has one"):
        _make("sae").rescale_(2.0, 1.0)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_read_to_the_bit(tmp_path: Path, name: str, activation: str) -> None:
    dictionary = _make(name, activation=activation, prefixes=(0.25, 1.0))
    dictionary.save_pretrained(tmp_path)
    read = load(tmp_path)
    assert type(read) is type(dictionary)
    assert read.config == dictionary.config
    assert read.state_dict().keys() == dictionary.state_dict().keys()
    x = torch.randn(1, 5, 8)
    assert torch.equal(read(x), dictionary(x))


def test_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    _make("skip").save_pretrained(tmp_path / "12.mlp")
    message = "holds a transcoder, and an SAE was asked for; lorsa.load reads any kind"
    with pytest.raises(CheckpointError, match=message):
        Sae.from_pretrained(tmp_path / "12.mlp")
    shape = LorsaConfig(d_model=8, n_qk_heads=2, d_qk_head=4, n_ov_heads=6, top_k=3, scale=0.5)
    Lorsa(shape).save_pretrained(tmp_path / "layer-12")
    assert type(load(tmp_path / "layer-12")) is Lorsa
    with pytest.raises(CheckpointError, match="holds a Lorsa, and a transcoder was asked for"):
        Transcoder.from_pretrained(tmp_path / "layer-12")


def test_a_skip_connection_needs_x() -> None:
    dictionary = _make("skip")
    with pytest.raises(ValueError, match="skip connection; decode needs x"):
        dictionary.decode(*dictionary.encode(torch.randn(1, 3, 8)))


@pytest.mark.parametrize(
    "prefixes", [(), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0), (0.01, 1.0), (1, 2)]
)
def test_prefixes_ascend_to_one(prefixes: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares of the 24 features that ascend and end at 1"):
        TranscoderConfig(prefixes=prefixes, **SHAPE)


def test_ports() -> None:
    assert _make("sae").config.ports.sites == (Site(3, "resid_out"),)
    assert _make("skip").config.ports.sites == (Site(3, "mlp_in"), Site(3, "mlp_out"))
    with pytest.raises(ValueError, match="site is 'attn', which is several"):
        SaeConfig(site="attn", **SHAPE)
    with pytest.raises(ValueError, match="'resid' is no site|several"):
        SaeConfig(site="resid", **SHAPE)


def test_a_mean_of_features_leaves_out_those_below_the_threshold() -> None:
    for activation in ("batchtopk", "jumprelu"):
        dictionary = _make("transcoder", activation=activation, max_l0=24).double()
        with torch.no_grad():
            if dictionary.log_threshold is not None:
                dictionary.log_threshold.fill_(0.0)
        x = torch.randn(2, 7, 8, dtype=torch.float64)
        z = (F.linear(x, dictionary.W_E, dictionary.b_E)).relu()
        z = torch.where(z * dictionary.norms() > 2.0, z, 0)
        torch.testing.assert_close(dictionary(x), z @ dictionary.W_O + dictionary.b_O)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_lets_top_k_fire_on_average(name: str, activation: str) -> None:
    dictionary = _make(name, activation=activation, max_l0=24)
    with torch.no_grad():
        if dictionary.log_threshold is not None:
            dictionary.log_threshold.zero_()
    x = torch.randn(32, 64, 8)
    dictionary.set_threshold(x)
    l0 = (dictionary.encode(x).acts != 0).float().sum(dim=-1).mean()
    assert abs(float(l0) - 5) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_thresholds_get_the_gradient_of_a_rectangle(name: str) -> None:
    """Both of what is decoded and of what counts; dense, as activation.py defines it."""
    dictionary = _make(name, activation="jumprelu", max_l0=24).double()
    assert dictionary.log_threshold is not None
    assert dictionary.threshold is not None
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    weight = torch.randn(2, 7, 8, dtype=torch.float64)
    firing = dictionary.fire(x, top_k=5, bandwidth=0.8)
    assert firing.fires is not None
    y_hat = dictionary.decode(firing.acts, firing.ids, x)
    loss = (y_hat * weight).sum() + firing.fires.sum()
    (found,) = torch.autograd.grad(loss, [dictionary.log_threshold])
    with torch.no_grad():
        read, bias = dictionary.centred(x)
        limit = dictionary.threshold * dictionary.log_threshold.exp()
        score = (read @ dictionary.W_E.T + bias).relu() * dictionary.norms() / limit
        near = (score - 1).abs() < 0.4
        slope = (weight @ dictionary.W_O.T) * limit / dictionary.norms() + 1
        expected = (torch.where(near, slope, 0) / -0.8).sum(dim=(0, 1))
    torch.testing.assert_close(found, expected)
