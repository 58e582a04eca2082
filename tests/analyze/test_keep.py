"""Entries that are kept of each feature, however the tokens come."""

import pytest
import torch
from lorsa.analyze.keep import Largest, draw, largest_by_sequence

N_FEATURES, N_CTX, N_KEPT = 9, 16, 4


def entries(n: int = 3000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads, activations with ties, places in order."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randint(0, N_FEATURES, (n,), generator=generator)
    acts = torch.randint(-50, 50, (n,), generator=generator).float() / 8
    return heads, acts, torch.arange(n) // 4


@pytest.mark.parametrize("step", [1, 64, 1000, 3000])
def test_the_largest_are_kept(step: int) -> None:
    heads, acts, places = entries()
    kept = Largest.none(N_FEATURES, N_KEPT)
    for start in range(0, len(heads), step):
        part = slice(start, start + step)
        kept.add(heads[part], acts[part].abs().double(), acts[part], places[part])
    for head in range(N_FEATURES):
        mine = [
            (-abs(float(a)), int(p))
            for a, p, h in zip(acts, places, heads, strict=True)
            if h == head
        ]
        expected = sorted(mine)[:N_KEPT]
        found = [
            (-float(k), int(p)) for k, p in zip(kept.keys[head], kept.places[head], strict=True)
        ]
        assert found == expected


def test_one_of_each_sequence() -> None:
    heads, acts, places = entries()
    found = {
        (int(h), int(p) // N_CTX): (abs(float(a)), int(p))
        for h, a, p in zip(
            *largest_by_sequence(heads, acts, places, N_FEATURES, N_CTX), strict=True
        )
    }
    expected: dict[tuple[int, int], tuple[float, int]] = {}
    for h, a, p in zip(heads.tolist(), acts.abs().tolist(), places.tolist(), strict=True):
        key = (h, p // N_CTX)
        if key not in expected or a > expected[key][0]:
            expected[key] = (a, p)
    assert found == expected


def test_draws_are_even_and_depend_on_head_and_place() -> None:
    places = torch.arange(20_000)
    drawn = draw(torch.full_like(places, 3), places)
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
    counts = torch.histc(drawn.float(), bins=20, min=0, max=1)
    assert float(counts.min()) > 850
    assert not torch.equal(drawn, draw(torch.full_like(places, 4), places))
    assert torch.equal(drawn[50:60], draw(torch.full((10,), 3), places[50:60]))


def test_few_entries_leave_room() -> None:
    kept = Largest.none(2, 3)
    kept.add(
        torch.tensor([1]), torch.tensor([2.0]).double(), torch.tensor([2.0]), torch.tensor([5])
    )
    assert kept.places[1].tolist() == [5, -1, -1]
    assert not torch.isfinite(kept.keys[0]).any()
