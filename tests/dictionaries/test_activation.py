"""Each rule against a dense definition in plain torch, and the ways between its units."""

from typing import Any

import pytest
import torch
from lorsa.dictionaries.activation import batch_top_k, jump, sum_by_feature
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.language.geometry import Rope
from torch import Tensor

TOP_K, N_OV_HEADS, BANDWIDTH = 3, 24, 0.8
LEARNED = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")


def _random(activation: str, *, backend: str = "torch", **settings: Any) -> Lorsa:
    config = LorsaConfig(
        **{
            "d_model": 10,
            "n_qk_heads": 2,
            "d_qk_head": 6,
            "n_ov_heads": N_OV_HEADS,
            "top_k": TOP_K,
            "scale": 0.4,
            "rope": Rope(inv_freq=(1.0, 0.1)),
            "activation": activation,
            **settings,
        }
    )
    lorsa = Lorsa(config, backend=backend)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_(generator=generator)
        if lorsa.log_threshold is not None:
            lorsa.log_threshold.mul_(0.2)
        lorsa.set_threshold(_x(8))
    return lorsa


def _x(batch: int = 3, seq: int = 37) -> Tensor:
    return torch.randn(batch, seq, 10, generator=torch.Generator().manual_seed(batch + seq))


def _candidates(scores: Tensor, max_l0: int) -> Tensor:
    """Return which heads are among a token's best, bool, [batch, seq, n_ov_heads]."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :max_l0]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def _dense_batchtopk(lorsa: Lorsa, x: Tensor, top_k: int, counted: Tensor) -> Tensor:
    """Return z of what fires in training, [batch, seq, n_ov_heads]."""
    z = lorsa.z_pre(x).relu()
    scores = (z * lorsa.W_O.norm(dim=1)).detach()
    scores = scores * _candidates(scores, lorsa.config.n_slots)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(len(x)):
        n_kept = top_k * int(counted[b].sum())
        order = scores[b, counted[b]].flatten().sort(descending=True, stable=True)
        mine = torch.zeros_like(order.values, dtype=torch.bool)
        mine[order.indices[:n_kept]] = True
        kept[b, counted[b]] = mine.view(-1, N_OV_HEADS)
        kept[b, ~counted[b]] = scores[b, ~counted[b]] > order.values[n_kept - 1]
    return z * kept


def _dense_jumprelu(lorsa: Lorsa, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return z and 1 of what fires, [batch, seq, n_ov_heads], with the thresholds' gradients."""
    assert lorsa.log_threshold is not None
    assert lorsa.threshold is not None
    z, norm = lorsa.z_pre(x).relu(), lorsa.W_O.detach().norm(dim=1)
    theta = lorsa.threshold * lorsa.log_threshold.detach().exp()
    scores = z.detach() * norm / theta
    mine = _candidates(scores, lorsa.config.n_slots)
    fires = (mine & (scores > 1)).float()
    near = (mine & ((scores - 1).abs() < BANDWIDTH / 2)).float()
    nothing = (lorsa.log_threshold - lorsa.log_threshold.detach()) / BANDWIDTH  # has a gradient
    return z * fires - near * theta / norm * nothing, fires - near * nothing


def _gradients(lorsa: Lorsa, y_hat: Tensor, *terms: Tensor) -> dict[str, Tensor]:
    lorsa.zero_grad()
    weight = torch.linspace(-1, 1, y_hat.numel()).view_as(y_hat)
    loss = (y_hat * weight).sum() + sum(term.square().sum() for term in terms)
    loss.backward()
    return {name: p.grad.clone() for name, p in lorsa.named_parameters() if p.grad is not None}


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm())
        assert error < 1e-5, (name, error)


def _spread(acts: Tensor, ids: Tensor) -> Tensor:
    return acts.new_zeros(*acts.shape[:2], N_OV_HEADS).scatter(-1, ids.long(), acts)


@pytest.fixture(params=["torch", "reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each path of the kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("max_l0", [5, 12, N_OV_HEADS])
def test_batchtopk_trains_as_the_dense_definition(backend: str, max_l0: int, masked: bool) -> None:
    lorsa, x = _random("batchtopk", backend=backend, max_l0=max_l0), _x()
    counted = torch.ones(x.shape[:2], dtype=torch.bool)
    if masked:
        counted[:, 0], counted[1, 5:9] = False, False
    z = _dense_batchtopk(lorsa, x, TOP_K, counted)
    expected = _gradients(lorsa, z @ lorsa.W_O + lorsa.b_O)
    firing = lorsa.fire(x, top_k=TOP_K, counted=counted if masked else None)
    assert torch.allclose(_spread(firing.acts, firing.ids), z, atol=1e-5)
    _compare(_gradients(lorsa, lorsa.decode(firing.acts, firing.ids)), expected)
    n_fired = (firing.acts != 0) & counted[..., None]
    assert n_fired.sum() == TOP_K * counted.sum()
    assert set(expected) == set(LEARNED)


@pytest.mark.parametrize("max_l0", [5, 12, N_OV_HEADS])
def test_jumprelu_trains_as_the_dense_definition(backend: str, max_l0: int) -> None:
    lorsa, x = _random("jumprelu", backend=backend, max_l0=max_l0), _x()
    z, fires = _dense_jumprelu(lorsa, x)
    expected = _gradients(lorsa, z @ lorsa.W_O + lorsa.b_O, fires.sum(dim=(1, 2)))
    firing = lorsa.fire(x, top_k=TOP_K, bandwidth=BANDWIDTH)
    assert firing.fires is not None
    assert torch.allclose(_spread(firing.acts, firing.ids), z, atol=1e-5)
    assert torch.equal(_spread(firing.fires, firing.ids), fires)
    y_hat = lorsa.decode(firing.acts, firing.ids)
    _compare(_gradients(lorsa, y_hat, firing.fires.sum(dim=(1, 2))), expected)
    assert set(expected) == {*LEARNED, "log_threshold"}
    assert expected["log_threshold"].count_nonzero() > N_OV_HEADS / 2


def test_above_the_threshold_fires(backend: str) -> None:
    x = _x()
    for activation in ("batchtopk", "jumprelu"):
        lorsa = _random(activation, backend=backend, max_l0=N_OV_HEADS)
        assert lorsa.threshold is not None
        z = lorsa.z_pre(x).relu()
        theta = lorsa.threshold.expand(N_OV_HEADS)
        if lorsa.log_threshold is not None:
            theta = theta * lorsa.log_threshold.exp()
        expected = z * (z * lorsa.W_O.norm(dim=1) > theta)
        assert torch.allclose(_spread(*lorsa.encode(x)), expected, atol=1e-5)
        assert torch.allclose(lorsa(x), expected @ lorsa.W_O + lorsa.b_O, atol=1e-4)
        n_fired = (expected != 0).sum(dim=-1)
        assert n_fired.unique().numel() > 1
        assert float(n_fired.float().mean()) == pytest.approx(TOP_K, rel=0.15)


def test_no_more_than_max_l0_fire() -> None:
    for activation in ("batchtopk", "jumprelu"):
        lorsa = _random(activation, max_l0=4)
        assert lorsa.threshold is not None
        lorsa.threshold.fill_(1e-6)
        acts, ids = lorsa.encode(_x())
        assert acts.shape == ids.shape == (3, 37, 4)
        assert (acts != 0).sum() > 0.9 * acts.numel()


def test_ids_ascend_and_encode_with_top_k_is_what_training_does() -> None:
    x = _x()
    for activation in ("batchtopk", "jumprelu"):
        lorsa = _random(activation)
        firing = lorsa.fire(x, top_k=5)
        acts, ids = lorsa.encode(x, top_k=5)
        assert torch.equal(acts, firing.acts)
        assert torch.equal(ids, firing.ids)
        assert (ids.diff(dim=-1) > 0).all()
    assert (_random("batchtopk").encode(x, top_k=5).acts != 0).sum() == 3 * 37 * 5


def test_a_sequence_fires_alike_in_any_company() -> None:
    x, lorsa = _x(), _random("batchtopk")
    whole = lorsa.fire(x, top_k=TOP_K)
    parts = [lorsa.fire(part, top_k=TOP_K) for part in x.split((1, 2))]
    assert torch.equal(whole.acts != 0, torch.cat([part.acts for part in parts]) != 0)
    edges = [part.edge for part in parts if part.edge is not None]
    torch.testing.assert_close(whole.edge, torch.cat(edges))


def test_of_equal_scores_the_lowest_token_and_id_are_kept() -> None:
    scores = torch.tensor([[[3.0, 1, 1], [1, 2, 1]], [[0, 0, 0], [0, 0, 5.0]]])
    kept, edge = batch_top_k(scores, 2)
    assert kept.int().tolist() == [[[1, 1, 1], [0, 1, 0]], [[1, 1, 1], [0, 0, 1]]]
    assert edge.tolist() == [1, 0]
    counted = torch.tensor([[False, True], [False, False]])
    kept, edge = batch_top_k(scores, 2, counted)
    assert kept.int().tolist() == [[[1, 0, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert edge.tolist() == [1, float("inf")]
    all_counted = torch.ones(2, 2, dtype=torch.bool)
    for a, b in zip(batch_top_k(scores, 2, all_counted), batch_top_k(scores, 2), strict=True):
        assert torch.equal(a, b)


def test_more_than_there_are_is_all() -> None:
    kept, edge = batch_top_k(torch.tensor([[[3.0, 1], [1, 2]]]), 5)
    assert kept.all()
    assert edge == 1


def test_a_score_that_is_nan_is_not_hidden() -> None:
    scores = torch.tensor([[[3.0, float("nan")], [1, 2]]])
    assert batch_top_k(scores, 1).fires[0, 0, 1]
    for activation in ("batchtopk", "jumprelu"):
        lorsa = _random(activation)
        with torch.no_grad():
            lorsa.b_V.fill_(float("nan"))
        assert lorsa(_x()).isnan().any()
        assert lorsa.decode(*lorsa.fire(_x(), top_k=TOP_K)[:2]).isnan().any()


def test_a_sum_by_feature_is_that_of_a_dense_count() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (500,), generator=generator, dtype=torch.int32)
    values = torch.randn(500, generator=generator)
    expected = torch.zeros(9).index_add(0, ids.long(), values)
    torch.testing.assert_close(sum_by_feature(ids, values, 9), expected)
    assert not sum_by_feature(ids[:0], values[:0], 9).any()


def test_no_score_near_its_threshold_moves_none() -> None:
    log_threshold = torch.zeros(3, requires_grad=True)
    acts = torch.tensor([[[5.0, 0.0]]], requires_grad=True)
    ids = torch.tensor([[[0, 2]]], dtype=torch.int32)
    jumped = jump(acts, ids, log_threshold, torch.ones(3), bandwidth=0.5)
    (jumped.acts.sum() + jumped.fires.sum()).backward()
    assert log_threshold.grad is not None
    assert not log_threshold.grad.any()
    assert acts.grad is not None
    assert acts.grad.tolist() == [[[1, 0]]]


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_other_units_change_nothing_else(activation: str) -> None:
    lorsa, x = _random(activation), _x()
    acts, y_hat = lorsa.encode(x).acts, lorsa(x)
    before = {name: t.clone() for name, t in lorsa.state_dict().items()}
    lorsa.rescale_(4.0, 0.25)
    assert torch.equal(lorsa.encode(4 * x).acts != 0, acts != 0)
    assert torch.allclose(lorsa(4 * x), y_hat / 4, rtol=1e-4, atol=1e-5)
    lorsa.rescale_(0.25, 4.0)
    assert all(torch.equal(t, before[name]) for name, t in lorsa.state_dict().items())


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_a_saved_rule_is_read_again(activation: str, tmp_path: Any) -> None:
    lorsa, x = _random(activation, max_l0=7), _x()
    lorsa.save_pretrained(tmp_path)
    again = Lorsa.from_pretrained(tmp_path)
    assert again.config == lorsa.config
    assert again.config.max_l0 == 7
    assert again.threshold == lorsa.threshold
    assert torch.equal(again(x), lorsa(x))


def test_the_threshold_moves_by_a_share() -> None:
    lorsa = _random("batchtopk")
    assert lorsa.threshold is not None
    lorsa.threshold.fill_(2.0)
    lorsa.move_threshold(torch.tensor(4.0), 0.25)
    assert lorsa.threshold == 2.5


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_a_view_with_another_rule_shares_the_weights(activation: str) -> None:
    lorsa, x = _random(activation), _x()
    other = lorsa.as_topk()
    assert other.config.activation == "topk"
    assert other.W_O is lorsa.W_O
    assert {name for name, _ in other.named_parameters()} == set(LEARNED)
    assert other.encode(x).acts.shape == (3, 37, TOP_K)
    with torch.no_grad():
        other.b_O.add_(1)
    assert torch.equal(other.b_O, lorsa.b_O)


def test_a_layer_of_zeros_gets_a_threshold_that_divides() -> None:
    lorsa = _random("jumprelu")
    with torch.no_grad():
        lorsa.W_V.zero_()
        lorsa.b_V.zero_()
        lorsa.set_threshold(_x())
    assert lorsa(_x()).isfinite().all()
    assert not lorsa.encode(_x()).acts.any()
