"""The figures that people compare."""

import pytest
import torch
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.metrics import FVU, evaluate, firing_counts
from torch import Tensor


def _outputs(n_tokens: int = 600, d_model: int = 12) -> Tensor:
    return torch.randn(n_tokens, d_model, generator=torch.Generator().manual_seed(0))


def _fvu(y: Tensor, y_hat: Tensor, sizes: list[int] | None = None) -> float:
    fvu = FVU()
    for a, b in zip(y.split(sizes or len(y)), y_hat.split(sizes or len(y)), strict=True):
        fvu.update(a, b)
    return fvu.value


def test_fvu_of_the_mean_is_one() -> None:
    y = _outputs() + 3
    assert _fvu(y, y.mean(dim=0).expand_as(y)) == pytest.approx(1, abs=1e-6)


def test_fvu_of_a_perfect_copy_is_zero() -> None:
    assert _fvu(_outputs(), _outputs()) == 0


def test_fvu_is_the_ratio_of_sums_not_the_mean_of_ratios() -> None:
    y = _outputs() * torch.linspace(0.01, 10, 600)[:, None]
    y_hat = y + _outputs().flip(0)
    expected = (y - y_hat).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert _fvu(y, y_hat) == pytest.approx(float(expected), rel=1e-5)


def test_fvu_with_a_large_mean_is_about_the_mean() -> None:
    """Variance about zero would make any predictor look perfect here."""
    y = _outputs().double() + 1e5
    expected = _fvu(_outputs().double(), _outputs().double() * 0.5)
    half = y.mean(dim=0) + (y - y.mean(dim=0)) * 0.5
    assert _fvu(y, half) == pytest.approx(0.25, rel=1e-6)
    assert expected == pytest.approx(0.25, rel=1e-2)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [[600], [1] * 600, [7, 193, 400], [599, 1]])
def test_fvu_does_not_depend_on_the_batches(sizes: list[int], offset: float) -> None:
    y = _outputs().double() + offset
    y_hat = y + 0.3 * _outputs().flip(0)
    assert _fvu(y, y_hat, sizes) == pytest.approx(_fvu(y, y_hat), rel=1e-10)


def test_fvu_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"y is \[3, 4\], y_hat is \[3, 5\]"):
        FVU().update(torch.ones(3, 4), torch.ones(3, 5))


def test_fvu_before_any_token_is_nan() -> None:
    value = FVU().value
    assert value != value


def test_firing_counts_leave_out_zeros() -> None:
    acts = torch.tensor([[[0.5, 0.0]], [[1.0, -2.0]]])
    ids = torch.tensor([[[0, 2]], [[0, 3]]], dtype=torch.int32)
    assert firing_counts(acts, ids, 5).tolist() == [2, 0, 0, 1, 0]


def test_evaluate_counts_only_what_is_above_the_threshold() -> None:
    config = LorsaConfig(
        d_model=4,
        n_qk_heads=1,
        d_qk_head=2,
        n_ov_heads=4,
        top_k=2,
        scale=1.0,
        activation="batchtopk",
    )
    lorsa = Lorsa(config)
    assert lorsa.threshold is not None
    with torch.no_grad():
        lorsa.b_V.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
        lorsa.W_O.copy_(torch.eye(4))
        lorsa.threshold.fill_(1.5)
    quality = evaluate(lorsa, [(torch.randn(2, 3, 4), torch.randn(2, 3, 4))])
    assert quality.l0 == 1
    assert quality.dead_fraction == 0.75


def test_evaluate_counts_firing_and_dead_heads() -> None:
    config = LorsaConfig(d_model=4, n_qk_heads=1, d_qk_head=2, n_ov_heads=4, top_k=2, scale=1.0)
    lorsa = Lorsa(config)
    with torch.no_grad():
        lorsa.b_V.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
        lorsa.W_O.copy_(torch.eye(4))
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    quality = evaluate(lorsa, [(x[:1], y[:1]), (x[1:], y[1:])])
    assert quality.l0 == 2
    assert quality.dead_fraction == 0.5
    assert quality.n_tokens == 6
    assert quality.fvu == pytest.approx(_fvu(y.flatten(0, 1), lorsa(x).detach().flatten(0, 1)))


def test_evaluate_leaves_out_what_does_not_count() -> None:
    config = LorsaConfig(d_model=4, n_qk_heads=1, d_qk_head=2, n_ov_heads=4, top_k=2, scale=1.0)
    torch.manual_seed(0)
    lorsa = Lorsa(config)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_()
    x, y = torch.randn(2, 6, 4), torch.randn(2, 6, 4) + 5
    counted = torch.rand(2, 6) > 0.5
    found = evaluate(lorsa, [(x[:1], y[:1], counted[:1]), (x[1:], y[1:], counted[1:])])
    y_hat = lorsa(x).detach()
    assert found.fvu == pytest.approx(_fvu(y[counted], y_hat[counted]))
    assert found.fvu_all == pytest.approx(_fvu(y.flatten(0, 1), y_hat.flatten(0, 1)))
    assert found.n_tokens == counted.sum()
    assert found.masked_fraction == pytest.approx(1 - float(counted.double().mean()))
    acts, ids = lorsa.encode(x)
    firing = firing_counts(acts[counted], ids[counted], 4)
    assert found.l0 == pytest.approx(float(firing.sum() / counted.sum()))
    assert found.dead_fraction == float((firing == 0).double().mean())
    plain = evaluate(lorsa, [(x, y)])
    assert plain.fvu == plain.fvu_all == pytest.approx(found.fvu_all)
    assert plain.masked_fraction == 0
