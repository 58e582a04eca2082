"""From where heads read, against patterns and values."""

from typing import Any

import pytest
import torch
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa, contributions_at
from lorsa.language.geometry import Alibi, Stretch
from torch import Tensor

WINDOW = 7


PARTICULAR: list[dict[str, Any]] = [
    {},
    {
        "sinks": True,
        "gate": "sigmoid",
        "alibi": Alibi(slopes=(0.1, 0.3)),
        "stretch": Stretch(gain=0.5, every=6),
        "clip": 1.5,
    },
    {"gate": "softplus", "chunk": 11},
]


def _lorsa(**settings: Any) -> Lorsa:
    config = LorsaConfig(
        d_model=12,
        n_qk_heads=2,
        d_qk_head=4,
        n_ov_heads=8,
        top_k=3,
        scale=0.5,
        window=WINDOW,
        **settings,
    )
    lorsa = Lorsa(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_(generator=generator)
    return lorsa


def _x() -> Tensor:
    return torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", PARTICULAR)
def test_contributions_sum_to_the_activations(settings: dict[str, Any]) -> None:
    lorsa, x = _lorsa(**settings), _x()
    acts, ids = lorsa.encode(x)
    parts = lorsa.contributions(x, ids)
    assert parts.shape == (2, 20, 3, 20)
    assert torch.allclose(parts.sum(dim=-1).relu(), acts, atol=1e-5)
    assert not parts[:, 10:, :, :3].any()  # outside of the window
    z = lorsa.z_pre(x).gather(-1, ids.long())
    assert torch.allclose(parts.sum(dim=-1), z, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_contributions_are_patterns_times_values(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same heads at every token, however many queries are worked through at once."""
    monkeypatch.setattr("lorsa.dictionaries.lorsa.contributions.MOST_ROWS", rows)
    lorsa, x = _lorsa(), _x()
    heads = [6, 1, 5]
    with torch.no_grad():
        pattern, v = lorsa.pattern(x, ov_heads=heads), lorsa.values(x)
        expected = pattern * v[..., heads].transpose(1, 2)[:, :, None]  # [batch, head, q, k]
    for ids in (heads, torch.tensor(heads, dtype=torch.int32)):
        parts = lorsa.contributions(x.bfloat16().float(), ids)
        assert torch.equal(parts, lorsa.contributions(x.bfloat16(), ids))  # as stores hold it
        assert torch.allclose(lorsa.contributions(x, ids), expected.transpose(1, 2), atol=1e-5)
    assert not parts.requires_grad


@pytest.mark.parametrize("settings", PARTICULAR)
def test_contributions_to_single_activations_are_the_same(settings: dict[str, Any]) -> None:
    lorsa, x = _lorsa(**settings), _x()
    ids = lorsa.encode(x).ids
    parts = lorsa.contributions(x, ids)
    which, positions, slots = (each.flatten() for each in torch.meshgrid(
        torch.arange(2), torch.arange(20), torch.arange(3), indexing="ij"
    ))  # fmt: skip
    heads = ids[which, positions, slots].long()
    single = contributions_at(lorsa, x, which, positions, heads)
    assert torch.allclose(single, parts[which, positions, slots], atol=1e-5)


def test_heads_that_are_not_there_are_named() -> None:
    lorsa, x = _lorsa(), _x()
    for head in (8, -1):
        with pytest.raises(ValueError, match=rf"ids has {head}; allowed: 0\.\.7"):
            lorsa.contributions(x, [0, head])
    for ids in (torch.zeros(2, 3, dtype=torch.int32), torch.tensor(3)):
        with pytest.raises(
            ValueError, match=r"ids is .*; it must be \[2, 20, slots\] or \[slots\]"
        ):
            lorsa.contributions(x, ids)
    with pytest.raises(ValueError, match=r"it must be \[batch, seq, 12\]"):
        lorsa.contributions(x[0], [0])
