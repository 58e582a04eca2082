"""Types of attention, on heads that are built by hand to be of one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lorsa.analyze.attention.kinds import Attended, kinds
from lorsa.analyze.attention.probes import probe_tokens
from lorsa.analyze.attention.types import types_of
from lorsa.analyze.choices import STORE_SCORES
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from torch import Tensor

N_VOCAB, SEQ, SHARP = 50, 41, 60.0


def one_hot_inputs(tokens: Tensor) -> Tensor:
    """What an ideal layer is given: the token, the one before it, its place, the place before."""
    batch, seq = tokens.shape
    before = torch.roll(tokens, 1, dims=1)
    before[:, 0] = N_VOCAB  # none
    place = torch.arange(seq).expand(batch, seq)
    parts = [
        torch.nn.functional.one_hot(tokens, N_VOCAB + 1),
        torch.nn.functional.one_hot(before, N_VOCAB + 1),
        torch.nn.functional.one_hot(place, SEQ + 1),
        torch.nn.functional.one_hot(place - 1 + (place == 0) * (SEQ + 1), SEQ + 1),
    ]
    return torch.cat(parts, dim=-1).float()


SLICES = {
    "token": slice(0, N_VOCAB + 1),
    "before": slice(N_VOCAB + 1, 2 * (N_VOCAB + 1)),
    "place": slice(2 * (N_VOCAB + 1), 2 * (N_VOCAB + 1) + SEQ + 1),
    "place_before": slice(2 * (N_VOCAB + 1) + SEQ + 1, 2 * (N_VOCAB + 1) + 2 * (SEQ + 1)),
}
HEADS = {
    "previous_token": ("place_before", "place"),
    "same_token": ("place", "place"),
    "induction": ("token", "before"),
    "duplicate_token": ("token", "token"),
    "first_token": (None, "place"),
}
"""What the query and the key of each are made of."""


def perfect(kind: str) -> Lorsa:
    """Return a Lorsa of one head that attends to nothing but sources of a kind."""
    query, key = (None if part is None else SLICES[part] for part in HEADS[kind])
    d_model, width = 2 * (N_VOCAB + 1) + 2 * (SEQ + 1), max(N_VOCAB, SEQ) + 1
    lorsa = Lorsa(
        LorsaConfig(
            d_model=d_model, n_qk_heads=1, d_qk_head=width, n_ov_heads=1, top_k=1, scale=1.0
        )
    )
    with torch.no_grad():
        n = key.stop - key.start
        lorsa.W_K[0, key, :n] = SHARP * torch.eye(n)
        if query is None:
            lorsa.b_Q[0, 0] = 1.0  # place 0, whoever asks
        else:
            lorsa.W_Q[0, query, :n] = torch.eye(n)
        lorsa.b_V.fill_(1.0)
        lorsa.W_O[0, 0] = 1.0
    return lorsa


def attended(lorsa: Lorsa, tokens: Tensor) -> Attended:
    found = Attended.none(lorsa.config.n_ov_heads)
    found.add(lorsa, one_hot_inputs(tokens), tokens)
    return found


TEXTS = {
    "random": torch.randint(0, N_VOCAB, (6, SEQ), generator=torch.Generator().manual_seed(0)),
    "probe": probe_tokens(np.arange(N_VOCAB), n_ctx=SEQ, bos=None),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind != "duplicate_token"])
def test_a_perfect_head_is_all_of_its_type(kind: str, text: str) -> None:
    tokens = TEXTS[text]
    shares = attended(perfect(kind), tokens).shares()
    doubled = 0.03 if (kind, text) == ("induction", "random") else 0  # there it reads itself too
    assert float(shares[kind]) == pytest.approx(1.0 - doubled, abs=1e-6 + doubled / 4)


@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind != "duplicate_token"])
def test_a_perfect_head_is_called_by_its_type(kind: str) -> None:
    found = Attended.none(1)
    for _ in range(3):  # 18 sequences
        found.add(perfect(kind), one_hot_inputs(TEXTS["random"]), TEXTS["random"])
    probed = attended(perfect(kind), TEXTS["probe"])
    called = types_of(found.n_fired, found.bounds(), probed.bounds())
    assert (called.type, called.by) == ([kind], ["both"])


def test_a_head_of_one_token_reads_as_a_duplicate_head_does() -> None:
    """It attends to all copies alike, itself included: half its reading where there is one."""
    shares = attended(perfect("duplicate_token"), TEXTS["probe"]).shares()
    assert float(shares["duplicate_token"]) == pytest.approx(0.5, abs=1e-6)
    assert float(shares["same_token"]) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("window", [None, 3])
def test_kinds_are_those_of_their_definitions(window: int | None) -> None:
    tokens = torch.tensor([[7, 3, 7, 3, 3]])
    found = kinds(tokens, slice(0, 5), window)[0]
    for t in range(5):
        for s in range(5):
            m = tokens[0].tolist()
            expected = {
                "previous_token": s == t - 1,
                "same_token": s == t,
                "duplicate_token": s < t and m[s] == m[t],
                "induction": 0 < s < t and m[s - 1] == m[t],
                "first_token": s == 0 and t > 1,
                "local": t - 8 <= s < t,
                "long_range": False,
            }
            for column, name in enumerate(STORE_SCORES):
                seen = t > 0 and (window is None or t - s < window)
                assert bool(found[t, s, column]) == (expected[name] and seen), (name, t, s)


def test_a_head_is_not_blamed_for_what_its_window_hides() -> None:
    """Tokens whose only copies were out of sight counted as if they offered some."""
    torch.manual_seed(0)
    lorsa = perfect("first_token")
    lorsa.config = replace(lorsa.config, window=8)
    found = attended(lorsa, TEXTS["random"])
    column = STORE_SCORES.index("first_token")
    assert 0 < float(found.by_kind[0, column]) <= float(found.offered[0, column])
    assert float(found.offered[0, column]) < 0.5 * float(found.amount[0])


def test_blocks_do_not_change_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, lorsa = TEXTS["random"], perfect("induction")
    whole = attended(lorsa, tokens)
    monkeypatch.setattr(
        "lorsa.dictionaries.lorsa.contributions.BLOCK_ELEMENTS", 3 * SEQ * len(tokens)
    )
    cut = attended(lorsa, tokens)
    for name in Attended.__slots__:
        assert torch.allclose(getattr(cut, name), getattr(whole, name)), name


def test_a_probe_repeats_random_tokens_once() -> None:
    tokens = probe_tokens(np.arange(5, 100), n_ctx=64, bos=1)
    assert tokens.shape[1] == 63
    assert (tokens[:, 0] == 1).all()
    assert torch.equal(tokens[:, 1:32], tokens[:, 32:])
    assert all(len(row.unique()) == 32 for row in tokens)


def test_a_doubled_token_is_no_induction() -> None:
    """A head that read itself, after two tokens of a kind, was called induction: s = t counted."""
    tokens = torch.tensor([[5, 5, 1, 2, 2, 3, 3, 3]])
    found = kinds(tokens, slice(0, 8))[0, :, :, STORE_SCORES.index("induction")]
    assert not found.diagonal().any()
    assert found.nonzero().tolist() == [[7, 6]]
    share = attended(perfect("same_token"), tokens).shares()["induction"]
    assert float(share) == pytest.approx(0.0, abs=1e-6)


def test_sums_of_sequences_are_those_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds take squares of what each sequence reads, over all of its blocks of queries."""
    tokens, lorsa = TEXTS["probe"], perfect("duplicate_token")
    monkeypatch.setattr(
        "lorsa.dictionaries.lorsa.contributions.BLOCK_ELEMENTS", 3 * SEQ * len(tokens)
    )
    found = attended(lorsa, tokens)
    alone = [attended(lorsa, one) for one in tokens.split(1)]
    c, o = (torch.stack([getattr(one, name) for one in alone]) for name in ("by_kind", "offered"))
    assert torch.allclose(found.kind_squared, (c * c).sum(dim=0))
    assert torch.allclose(found.kind_offered, (c * o).sum(dim=0))
    assert torch.allclose(found.offered_squared, (o * o).sum(dim=0))
    assert torch.equal(found.n_seqs, (o > 0).double().sum(dim=0))
    n_offered = torch.stack([one.n_offered for one in alone]).sum(dim=0)
    assert torch.equal(found.n_offered, n_offered)
    again = attended(lorsa, tokens[:4])
    again.add(lorsa, one_hot_inputs(tokens[4:]), tokens[4:])
    assert torch.allclose(again.bounds(), found.bounds(), equal_nan=True)


def test_bounds_lie_below_shares() -> None:
    found = attended(perfect("duplicate_token"), TEXTS["random"][:, :40].reshape(12, 20))
    share, low = found.shares()["same_token"], found.bounds()[:, 1]
    assert 0 < float(low) < float(share)
    few = attended(perfect("duplicate_token"), TEXTS["probe"][:7])  # sequences
    assert few.bounds().isnan().all()
