"""Measures on stored outputs, against their definitions written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.metrics import evaluate
from lorsa.evaluate.on_store import frequency_histogram, measure
from lorsa.store.read.reader import Activations
from torch import Tensor

N, N_CTX, D_MODEL = 5, 7, 12


def _lorsa() -> Lorsa:
    sizes = {"n_qk_heads": 2, "d_qk_head": 4, "n_ov_heads": 24, "top_k": 3}
    lorsa = Lorsa(LorsaConfig(d_model=D_MODEL, scale=0.5, **sizes))
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return lorsa


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, N_CTX, D_MODEL, generator=generator)
    y = 3 + torch.randn(N, N_CTX, D_MODEL, generator=generator)
    y[1, 2] = 0
    return x, y


def _batches(size: int) -> list[Activations]:
    x, y = _data()
    return [Activations(*part) for part in zip(x.split(size), y.split(size), strict=True)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_measures_are_their_definitions(size: int) -> None:
    """In batches of any size; a token with y = 0 counts in neither NMSE nor cosine."""
    lorsa = _lorsa()
    found = measure(lorsa, _batches(size), N_CTX)
    x, y = _data()
    with torch.no_grad():
        y_hat = lorsa(x).double()
        acts, _ids = lorsa.encode(x)
    y = y.double()
    residual, square = (y - y_hat).square().sum(-1), y.square().sum(-1)
    variance = (y - y.mean(dim=(0, 1))).square().sum(-1)
    there = square > 0
    assert found.n_tokens == N * N_CTX
    assert found.fvu == pytest.approx(float(residual.sum() / variance.sum()))
    assert found.nmse == pytest.approx(float((residual / square)[there].mean()))
    assert found.cosine == pytest.approx(float(F.cosine_similarity(y, y_hat, dim=-1)[there].mean()))
    assert found.l0 == pytest.approx(float((acts != 0).sum() / (N * N_CTX)))
    for t in range(N_CTX):
        by, some = found.by_position, there[:, t]
        assert by.fvu[t] == pytest.approx(float(residual[:, t].sum() / variance[:, t].sum()))
        assert by.variance[t] == pytest.approx(float(variance[:, t].mean()))
        assert by.nmse[t] == pytest.approx(float((residual / square)[some, t].mean()))
        cosine = F.cosine_similarity(y[some, t], y_hat[some, t], dim=-1)
        assert by.cosine[t] == pytest.approx(float(cosine.mean()))
        assert by.l0[t] == pytest.approx(float((acts[:, t] != 0).sum() / N))


def test_it_agrees_with_the_training_measure() -> None:
    lorsa = _lorsa()
    found, theirs = measure(lorsa, _batches(2), N_CTX), evaluate(lorsa, _batches(2))
    assert (found.fvu, found.l0) == (theirs.fvu, theirs.l0)
    assert found.dead_fraction == theirs.dead_fraction


def test_tokens_of_outlier_norm_are_measured_apart_too() -> None:
    """Beside the FVU of all tokens, which a few may lead, stands what training reports."""
    lorsa, (x, y) = _lorsa(), _data()
    y[2, 3] *= 1000
    longest = float(10 * y.norm(dim=2).median())
    counted = torch.ones(N, N_CTX, dtype=torch.bool)
    counted[2, 3] = False
    found = measure(lorsa, [Activations(x, y)], N_CTX, longest=longest)
    theirs = evaluate(lorsa, [(x, y, counted)])
    assert found.fvu_usual == theirs.fvu
    assert found.fvu == theirs.fvu_all < found.fvu_usual / 2
    assert found.outlier_fraction == 1 / (N * N_CTX)
    whole = measure(lorsa, [Activations(x, y)], N_CTX)
    assert whole.fvu_usual == whole.fvu == pytest.approx(found.fvu)
    assert whole.outlier_fraction == 0


def test_the_fvu_is_the_positions_weighted_by_their_variance() -> None:
    found = measure(_lorsa(), _batches(2), N_CTX)
    by = found.by_position
    pairs = list(zip(by.fvu, by.variance, strict=True))
    total = sum(weight for _fvu, weight in pairs if weight is not None)
    parts = sum(fvu * weight for fvu, weight in pairs if fvu is not None and weight is not None)
    assert parts / total == pytest.approx(found.fvu)


def test_what_is_undefined_is_none_in_json() -> None:
    zeros = torch.zeros(2, N_CTX, D_MODEL)
    data = measure(_lorsa(), [Activations(zeros, zeros)], N_CTX).to_dict()
    assert (data["fvu"], data["nmse"], data["cosine"]) == (None, None, None)
    assert data["by_position"]["fvu"] == [None] * N_CTX
    assert data["by_position"]["cosine"] == [None] * N_CTX
    nothing = measure(_lorsa(), [], N_CTX)
    assert math.isnan(nothing.fvu)
    assert nothing.by_position.l0 == [None] * N_CTX


@pytest.mark.parametrize(
    ("counts", "n_tokens", "log10_from", "n_features"),
    [
        ([0, 1, 9, 10, 99, 100, 999, 1000], 1000, [-3, -2, -1], [2, 2, 3]),
        ([0, 1, 10, 100, 1001], 1001, [-4, -3, -2, -1], [1, 1, 1, 1]),
        ([0, 1], 1, [-1], [1]),
        ([0, 0, 3], 10, [-1], [1]),
    ],
)
def test_frequencies_at_the_edges_of_decades(
    counts: list[int], n_tokens: int, log10_from: list[int], n_features: list[int]
) -> None:
    """A head on a tenth of all tokens belongs to the decade from 0.1; nothing is rounded."""
    found = frequency_histogram(torch.tensor(counts), n_tokens)
    assert found.log10_from == log10_from
    assert found.n_features == n_features
    assert found.n_silent == counts.count(0)
