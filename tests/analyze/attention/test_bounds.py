"""Lower bounds of shares: their size, and how often the truth lies below them."""

import pytest
import torch
from lorsa.analyze.attention.bounds import DOUBT, LEAST_SEQS, Sums, lower_bounds, t_quantile


@pytest.mark.parametrize(
    ("df", "known"), [(5, 2.0150), (7, 1.8946), (10, 1.8125), (23, 1.7139), (200, 1.6525)]
)
def test_students_quantile_is_that_of_tables(df: int, known: float) -> None:
    assert float(t_quantile(torch.tensor(df))) == pytest.approx(known, abs=1e-3)


@pytest.mark.parametrize("n", [12, 24, 200])
def test_the_truth_seldom_lies_below(n: int) -> None:
    """In 4,000 worlds whose share is known: sequences of unequal size, each with a lean."""
    generator = torch.Generator().manual_seed(n)
    shape = (n, 4000)
    o = torch.rand(shape, generator=generator) + 0.2
    lean = (0.6 + 0.15 * torch.randn(shape, generator=generator)).clamp(0, 1)
    low = lower_bounds(Sums.of(lean * o, o))
    missed = float((low > 0.6).double().mean())
    assert missed < DOUBT + 0.02


def test_one_long_sequence_is_no_evidence() -> None:
    """A share of 1.00 in one text that is a hundred others long is no more than that of one."""
    o = torch.ones(40, 2)
    o[0, 1] = 4000.0
    even, one = lower_bounds(Sums.of(o.clone(), o)).tolist()
    assert even == pytest.approx(DOUBT ** (1 / 40))
    assert one < 0.1


def test_too_few_sequences_or_firings_tell_nothing() -> None:
    o = torch.ones(LEAST_SEQS, 1)
    assert lower_bounds(Sums.of(o, o)).isfinite().all()
    assert lower_bounds(Sums.of(o[1:], o[1:])).isnan().all()
    assert lower_bounds(Sums.of(o, o), torch.tensor([19])).isnan().all()
    assert lower_bounds(Sums.of(o * 0, o * 0)).isnan().all()


def test_the_bound_is_the_formula() -> None:
    c = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5, 2.5, 0.0, 1.0, 2.0])
    o = torch.tensor([2.0, 2.0, 1.0, 4.0, 2.0, 3.0, 1.0, 2.0, 2.5])
    ratio = c.sum() / o.sum()
    residual = c - ratio * o
    error = (9 / 8 * residual.square().sum()).sqrt() / o.sum()
    low = lower_bounds(Sums.of(c[:, None], o[:, None]))
    assert float(low) == pytest.approx(float(ratio - 1.8595 * error), abs=1e-3)
