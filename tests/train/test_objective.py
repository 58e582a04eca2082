"""What a step minimises: the tokens that count, and they alone."""

import pytest
import torch
from lorsa.dictionaries.linear_config import SaeConfig
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.sae import Sae
from lorsa.train.objective import LONGEST, Objective, masked_mean
from torch import Tensor

TOP_K = 3


@pytest.fixture
def objective() -> Objective:
    torch.manual_seed(0)
    shape = LorsaConfig(d_model=6, n_qk_heads=2, d_qk_head=4, n_ov_heads=8, top_k=TOP_K, scale=0.5)
    lorsa = Lorsa(shape)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_()
    return Objective(lorsa)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, 5, 6, generator=generator) for _ in range(2))
    return x, y, torch.rand(3, 5, generator=generator) > 0.4


def test_the_loss_is_the_mean_over_the_tokens_that_count(
    objective: Objective, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, counted = batch
    error = (objective.dictionary(x) - y).square().detach()
    assert objective(x, y, TOP_K).loss == error.mean()
    loss = objective(x, y, TOP_K, counted).loss
    assert loss.item() == pytest.approx(float(error[counted].mean()), rel=1e-6)
    assert objective(x, y, TOP_K, counted, 0.25).loss == loss / 4
    everything = torch.ones_like(counted)
    assert objective(x, y, TOP_K, everything).loss.item() == pytest.approx(float(error.mean()))


def test_a_masked_token_is_attended_to_and_its_y_is_not_looked_at(
    objective: Objective, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, counted = batch
    counted[:, 0] = False
    counted[:, -1] = True
    loss = objective(x, y, TOP_K, counted).loss
    other_y = torch.where(counted[..., None], y, torch.full_like(y, float("inf")))
    assert objective(x, other_y, TOP_K, counted).loss == loss
    other_x = x.clone()
    other_x[:, 0] += 1
    assert objective(other_x, y, TOP_K, counted).loss != loss


def test_parts_of_a_batch_weigh_as_many_tokens_as_they_count(
    objective: Objective, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Gradients of processes are averaged, and each may count another number of tokens."""
    x, y, counted = batch
    objective(x, y, TOP_K, counted).loss.backward()
    whole = [p.grad for p in objective.dictionary.parameters()]
    objective.zero_grad()
    for part in (slice(0, 1), slice(1, 3)):
        weight = float(counted[part].sum() / counted.sum())
        objective(x[part], y[part], TOP_K, counted[part], weight).loss.backward()
    for a, b in zip(whole, (p.grad for p in objective.dictionary.parameters()), strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["batchtopk", "jumprelu"])
def ruled(request: pytest.FixtureRequest) -> Objective:
    """An objective of a rule whose top_k is a mean."""
    torch.manual_seed(0)
    shape = LorsaConfig(
        d_model=6,
        n_qk_heads=2,
        d_qk_head=4,
        n_ov_heads=16,
        top_k=TOP_K,
        scale=0.5,
        activation=request.param,
    )
    lorsa = Lorsa(shape)
    with torch.no_grad():
        for name, parameter in lorsa.named_parameters():
            parameter.normal_(std=0.1 if name == "log_threshold" else 1.0)
        lorsa.set_threshold(torch.randn(8, 5, 6))
    return Objective(lorsa, jump_bandwidth=1.5, l0_coefficient=0.3)


@pytest.mark.parametrize("masked", [False, True])
def test_of_every_rule_parts_of_a_batch_add_up(
    ruled: Objective, batch: tuple[Tensor, Tensor, Tensor], masked: bool
) -> None:
    x, y, counted = batch
    counted = counted if masked else torch.ones_like(counted)
    whole = ruled(x, y, TOP_K, counted if masked else None)
    whole.loss.backward()
    gradients = {name: p.grad for name, p in ruled.dictionary.named_parameters()}
    ruled.zero_grad()
    parts = []
    for part in (slice(0, 1), slice(1, 3)):
        weight = float(counted[part].sum() / counted.sum())
        mine = counted[part] if masked else None
        parts.append(ruled(x[part], y[part], TOP_K, mine, weight))
        parts[-1].loss.backward()
    for name, p in ruled.dictionary.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-5)
    for name in ("loss", "error", "edge"):
        if (value := getattr(whole, name)) is not None:
            total = torch.stack([getattr(part, name) for part in parts]).sum()
            torch.testing.assert_close(total, value)


def test_jumprelu_is_drawn_to_top_k(ruled: Objective, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, counted = batch
    out = ruled(x, y, TOP_K, counted)
    if ruled.dictionary.log_threshold is None:
        assert out.edge is not None
        assert torch.equal(out.loss, out.error)
        return
    fires = (ruled.dictionary.encode(x).acts != 0).sum(dim=2)
    l0 = torch.stack([n[c].float().mean() for n, c in zip(fires, counted, strict=True)])
    weights = counted.sum(dim=1) / counted.sum()
    excess = ((l0 / TOP_K - 1).square() * weights).sum()
    torch.testing.assert_close(out.loss - out.error, 0.3 * excess)


def test_sequences_without_a_token_that_counts_weigh_nothing(
    ruled: Objective, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, _ = batch
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[1] = False
    out = ruled(x, y, TOP_K, counted)
    other = ruled(x[[0, 2]], y[[0, 2]], TOP_K)
    torch.testing.assert_close(out.loss, other.loss)
    if other.edge is not None:
        torch.testing.assert_close(out.edge, other.edge)
    out = ruled(x, y, TOP_K, torch.zeros_like(counted))
    out.loss.backward()
    assert out.error == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in ruled.dictionary.parameters())


def test_no_token_that_counts_gives_a_loss_of_zero() -> None:
    values = torch.randn(2, 3, 4, requires_grad=True)
    loss = masked_mean(values, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert values.grad is not None
    assert not values.grad.any()


def test_tokens_of_outlier_norm_count_as_if_they_were_shorter() -> None:
    """Masked or not; a Lorsa's masked tokens do not count at all."""
    torch.manual_seed(0)
    sae = Sae(SaeConfig(d_model=6, n_features=8, top_k=TOP_K, layer=0, site="resid_out"))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    x = torch.randn(2, 5, 6)
    x = x / x.norm(dim=2, keepdim=True) * 6**0.5
    x[:, 0] *= 100.0
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[:, :2] = False
    error = (sae(x) - x).square().mean(dim=2).detach()
    shares = torch.where(counted, 1.0, 0.0)
    shares[:, 0] = (LONGEST / 100.0) ** 2
    found = Objective(sae)(x, x, TOP_K, counted)
    torch.testing.assert_close(found.loss.detach(), (error * shares).sum() / counted.sum())
    torch.testing.assert_close(found.error, error[counted].mean())
    shares[:, 1] = 1.0
    torch.testing.assert_close(Objective(sae)(x, x, TOP_K).loss.detach(), (error * shares).mean())
    counted[:] = False
    assert Objective(sae)(x, x, TOP_K, counted).loss.isfinite()
