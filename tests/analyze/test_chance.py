"""What is said of a head is beyond what random directions, common tokens and other heads do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lorsa.analyze.attention.sources import Sources, source_tokens
from lorsa.analyze.chance import share_scores
from lorsa.analyze.choices import BAR, LIST_BAR
from lorsa.analyze.collect import Chosen
from lorsa.analyze.effects import Effects, effects
from lorsa.analyze.said import said
from lorsa.analyze.tables import Shown, effect_columns, neighbours
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.language.norms import Language, LinearNorm, Norm
from torch import Tensor

D_MODEL, N_VOCAB, N_HEADS = 128, 4000, 512


@pytest.fixture(scope="module")
def language() -> Language:
    """Embeddings around a layer: some rows are long, some tokens alike, and all have a mean."""
    seeded = torch.Generator().manual_seed(1)

    def rows() -> Tensor:
        found = torch.randn(N_VOCAB, D_MODEL, generator=seeded)
        found[:200] *= 3
        found[200:220] = found[200] + 0.5 * found[200:220]
        return found + 2 * torch.randn(D_MODEL, generator=seeded)

    norm = Norm(torch.ones(D_MODEL).double(), torch.zeros(D_MODEL).double(), centred=False)
    return Language(None, None, LinearNorm(norm, 1.0), rows(), rows())


def _lorsa(change: Callable[[Lorsa], None] = lambda lorsa: None) -> Lorsa:
    config = LorsaConfig(
        d_model=D_MODEL, n_ov_heads=N_HEADS, n_qk_heads=8, d_qk_head=8, top_k=8, scale=0.5
    )
    lorsa = Lorsa(config)
    seeded = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in (lorsa.W_O, lorsa.W_V):
            weight.copy_(torch.randn(weight.shape, generator=seeded))
        change(lorsa)
    return lorsa


def _said(found: Effects, name: str) -> list[list[int]]:
    """Return the tokens that are said of each head."""
    columns: dict[str, Any] = effect_columns(found)
    rows = [
        dict(zip(columns, row, strict=True))
        for row in zip(*map(_plain, columns.values()), strict=True)
    ]
    return [[each["token"] for each in said(row, name) or []] for row in rows]


def _plain(column: Any) -> list[Any]:
    return column if isinstance(column, list) else column.tolist()


def test_random_heads_promote_nothing(language: Language) -> None:
    """Every head's list stood on the page as a fact, though 99 % of lists were those of noise.

    One in 100,000 passes by chance; of these 512, three lists each, none does. Clusters of like
    tokens let one or two pass a bar that took the lists' scores for normal.
    """
    found = effects(_lorsa(), language, torch.ones(N_HEADS), N_VOCAB)
    for name in ("promoted", "suppressed", "reads_embedding"):
        assert sum(map(len, _said(found, name))) == 0, name
        assert abs(float(getattr(found, name).list_z.mean())) < 0.3, name


def test_heads_that_write_and_read_tokens_say_so(language: Language) -> None:
    """Long rows or short ones, one token or several alike."""

    def change(lorsa: Lorsa) -> None:
        lorsa.W_O[0] = language.unembedding[3000] - language.unembedding.mean(dim=0)
        lorsa.W_O[1] = -0.01 * (language.unembedding[100] - language.unembedding.mean(dim=0))
        lorsa.W_O[2] = language.unembedding[200] - language.unembedding.mean(dim=0)
        lorsa.W_V[3] = language.embedding[3000] - language.embedding.mean(dim=0)

    found = effects(_lorsa(change), language, torch.ones(N_HEADS), N_VOCAB)
    promoted, suppressed = _said(found, "promoted"), _said(found, "suppressed")
    assert promoted[0] == [3000]
    assert suppressed[1] == [100]
    assert set(promoted[2]) <= set(range(200, 220))
    assert len(promoted[2]) == 10
    assert _said(found, "reads_embedding")[3] == [3000]
    assert found.promoted.list_z is not None
    assert float(found.promoted.list_z[0]) > LIST_BAR + 1
    assert sum(map(len, promoted)) == 11


def test_what_every_token_gets_is_said_of_none(language: Language) -> None:
    """A head that reads the mean of all embeddings reads no token in particular."""

    def change(lorsa: Lorsa) -> None:
        lorsa.W_V[0] = language.embedding.mean(dim=0)

    found = effects(_lorsa(change), language, torch.ones(N_HEADS), N_VOCAB)
    assert float(found.reads_embedding.values[0].min()) > float(
        found.reads_embedding.values[1:].max()
    )
    assert _said(found, "reads_embedding")[0] == []


def test_a_head_that_writes_nothing_promotes_nothing(language: Language) -> None:
    def change(lorsa: Lorsa) -> None:
        lorsa.W_O[0] = 0

    found = effects(_lorsa(change), language, torch.full((N_HEADS,), torch.nan), N_VOCAB)
    assert _said(found, "promoted")[0] == []
    assert torch.isfinite(found.promoted.z).all()


def test_random_directions_are_no_neighbours() -> None:
    """The nearest of random heads were listed as heads that write alike."""
    rows = torch.randn(N_HEADS, D_MODEL, generator=torch.Generator().manual_seed(3))
    assert int((neighbours(rows).z >= BAR).sum()) == 0
    few = neighbours(rows[:4])
    assert few.ids.shape == (4, 3)
    assert int((few.z >= BAR).sum()) == 0


def test_copies_are_neighbours_even_in_a_large_family() -> None:
    """An eighth of all heads are near-copies; a variance over all heads would call that chance."""
    rows = torch.randn(N_HEADS, D_MODEL, generator=torch.Generator().manual_seed(3))
    rows[:64] = rows[0] + 0.3 * rows[:64]
    found = neighbours(rows)
    assert bool((found.z[:64] >= BAR).all())
    assert int((found.z[64:] >= BAR).sum()) == 0


def test_heads_in_a_narrow_space_are_alike_by_chance() -> None:
    """Random directions of a layer that writes to few dimensions have large cosines."""
    narrow = torch.randn(N_HEADS, D_MODEL, generator=torch.Generator().manual_seed(3))
    narrow[:, 8:] *= 0.05
    found = neighbours(narrow)
    assert float(found.values.mean()) > 0.7
    assert int((found.z >= BAR).sum()) == 0


def _reading(
    of_head: Callable[[int, Any], Any], n_heads: int = 200, n: int = 16
) -> list[list[int]]:
    """Return the source tokens said of heads that read one place in each of n sequences."""
    rng, n_heads = np.random.default_rng(0), 200
    chances = 1 / np.arange(1, 5001)
    tokens = rng.choice(5000, (400, 128), p=chances / chances.sum())
    shown = Shown(np.arange(400), tokens, np.zeros_like(tokens))
    heads = np.repeat(np.arange(n_heads), n)
    seqs = np.concatenate([rng.choice(400, n, replace=False) for _ in range(n_heads)])
    positions = np.array([of_head(h, tokens[s]) for h, s in zip(heads, seqs, strict=True)])
    zeros = torch.zeros(len(heads))
    chosen = Chosen(
        torch.from_numpy(heads), zeros == 0, zeros, zeros, zeros, torch.from_numpy(seqs * 128 + 127)
    )
    noise = torch.from_numpy(rng.integers(0, 128, (len(heads), 3)))
    places = torch.cat([torch.from_numpy(positions)[:, None], noise], dim=1)
    parts = torch.tensor([0.7, 0.1, -0.1, 0.1]).expand(len(heads), 4)
    reads, z = source_tokens(chosen, Sources(places, parts, zeros), shown, n_heads)
    rows = [{"reads": a, "reads_z": b} for a, b in zip(reads, z, strict=True)]
    return [[each["token"] for each in said(row, "reads") or []] for row in rows]


def test_heads_that_read_any_token_read_none() -> None:
    """The commonest tokens of a text stood as what a head reads, whatever it read."""
    rng = np.random.default_rng(1)
    assert sum(map(len, _reading(lambda head, text: rng.integers(128)))) == 0


def test_heads_that_read_one_token_say_so() -> None:
    """Where it stands in the sequence, common or rare; chance of the others stays unsaid."""
    rng = np.random.default_rng(1)
    wanted = {0: 2, 1: 3, 2: 8}

    def place(head: int, text: Any) -> Any:
        there = np.flatnonzero(text == wanted.get(head, -1))
        return there[0] if len(there) else rng.integers(128)

    found = _reading(place)
    assert found[:3] == [[2], [3], [8]]
    assert sum(map(len, found[3:])) == 0


def test_few_examples_say_nothing_of_reading() -> None:
    assert sum(map(len, _reading(lambda head, text: 0, n=3))) == 0


@pytest.mark.parametrize(
    ("share", "rate", "n", "least", "most"),
    [
        (1 / 16, 1e-5, 16, 0, BAR),  # a rare word, read once
        (3 / 16, 1e-5, 16, BAR, 99),  # thrice, in three sequences
        (0.5, 0.05, 16, 0, BAR),
        (0.8, 0.05, 16, BAR, 99),
        (0.05, 0.05, 10_000, 0, 1e-3),
        (1.0, 0.5, 16, 0, BAR),
        (1.0, 1e-5, 3, 0, 1e-9),  # too few
    ],
)
def test_shares_are_compared_with_what_is_expected(
    share: float, rate: float, n: int, least: float, most: float
) -> None:
    (z,) = share_scores(np.array([share]), np.array([rate]), np.array([n]))
    assert least <= z <= most
